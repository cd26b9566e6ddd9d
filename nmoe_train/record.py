"""run.json: what was trained, and how a device answers. RUN.md documents every key; run.py reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nmoe_edge.common.limits import MAX_EXPERTS
from nmoe_edge.protocol.answering import AnswerRules
from nmoe_train.nets import NetSpec

SCHEMA = 2
SCHEMAS = (1, SCHEMA)
"""Schema 1 has no calibration and no statistics of familiar latents."""


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The training data."""

    name: str
    fingerprint: str
    """sha256 of the samples and of their split among clients."""
    samples: int
    """Training samples of all clients together, without the held-out ones."""
    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int, ...]
    """Shape of one sample."""
    layout: Literal["CHW", "HWC", "none"]

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.shape or min(self.shape) < 1:
            raise ValueError(f"data: {self.samples} samples of shape {list(self.shape)}; all must be at least 1")
        if not self.name.isprintable():
            raise ValueError("data.name contains characters that cannot be printed")


@dataclass(frozen=True, slots=True)
class Networks:
    """The specification that each network is rebuilt from."""

    extractor: NetSpec
    gate: NetSpec
    expert: NetSpec
    head: NetSpec | None = None
    """The head of stage 1's classifier; None when stage 1 trained no classifier (FedSC)."""


@dataclass(frozen=True, slots=True)
class Inference:
    """The rules by which a device answers a row."""

    top_k: int
    """Number of experts that the gate sends a row to."""
    combination: Literal["outputs", "probabilities"]
    """What is averaged over experts: their raw outputs, or the softmax of each."""
    local_first: float | None = None
    """Answer a row locally when the device's own expert has a confidence above this; None: the gate alone decides.
    Training chooses the value on held-out samples."""
    adapt: bool = False
    """Whether a device estimates its class mix and multiplies its answers by it."""
    familiar: float | None = None
    """Answer a row locally only if its latent is at most this far from what the client knows; None: not tested."""

    def __post_init__(self) -> None:
        if self.local_first is not None and not 0 <= self.local_first <= 1:
            raise ValueError(f"local_first is {self.local_first}, not in 0..1")
        if self.familiar is not None and not 0 <= self.familiar < float("inf"):
            raise ValueError(f"familiar is {self.familiar}; it must be a finite number, 0 or more")

    def answer_rules(self) -> AnswerRules:
        """The same rules, as nmoe_edge.protocol.answering takes them."""
        return AnswerRules(self.top_k, self.combination, self.local_first, self.familiar, self.adapt)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the run."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of run.json; RUN.md documents every key."""

    schema: int
    config: Mapping[str, Any]
    """Every setting of the training, defaults included."""
    seed: int
    data: DataRecord
    networks: Networks
    latent_dim: int
    experts: int
    outputs: int
    personal_gates: bool
    """Whether each device has its own gate, in gates/NN.safetensors."""
    answers_carry_prior: bool
    """Whether experts favour their own client's classes; False after logit adjustment or calibration."""
    inference: Inference
    labels: tuple[str, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages that affect the numbers; write_run fills this in."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Size and sha256 of every other required file, by path in the folder; write_run fills this in."""

    def __post_init__(self) -> None:
        if self.schema not in SCHEMAS:
            raise ValueError(unknown_schema(self.schema))
        if self.schema == 1 and self.inference.familiar is not None:
            raise ValueError("inference.familiar needs schema 2")
        if min(self.latent_dim, self.outputs) < 1 or not 1 <= self.experts <= MAX_EXPERTS:
            raise ValueError(f"latent_dim and outputs must be at least 1, experts 1 to {MAX_EXPERTS}")
        if self.inference.adapt and self.answers_carry_prior:
            raise ValueError("inference.adapt needs answers_carry_prior to be false")
        if not 1 <= self.inference.top_k <= self.experts:
            raise ValueError(f"inference.top_k is {self.inference.top_k}, but there are {self.experts} experts")
        if self.labels is not None and len(self.labels) != self.outputs:
            raise ValueError(f"there are {len(self.labels)} labels for {self.outputs} outputs")
        if self.labels is not None and not all(label.isprintable() for label in self.labels):
            raise ValueError("a label contains characters that cannot be printed")


def unknown_schema(schema: object) -> str:
    """What to say about another schema."""
    return f"schema {schema!r:.40} is unknown; this version of nmoe reads schemas 1 to {SCHEMA}"
