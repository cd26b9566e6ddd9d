"""What a bundle says of itself: the noun that export writes and a device reads. BUNDLE.md explains every key.

Pure data: checked when it is made, rendered in exactly one way. It knows no file; bundle.py does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nmoe_edge.common.limits import MAX_ANSWERED, MAX_EXPERTS, check_device_name
from nmoe_edge.common.schema import from_plain, nearest, parse_json, to_plain
from nmoe_edge.protocol.messages import TRUNK_BYTES
from nmoe_edge.protocol.tensor import MAX_DIMS

SCHEMA = 1

GRAPHS = ("extractor.onnx", "gate.onnx", "expert.onnx")
REQUIRED = (*GRAPHS, "selftest.npz")
OPTIONAL = ("labels.txt",)

_SEAL = re.compile(rb'"digest": "([0-9a-f]{64})"\n}\n\Z')
"""How every manifest ends. The bytes are digested, not what they mean: later keys with defaults break no old seal."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEASURE = re.compile(r"[a-z0-9_.-]{1,60}")


def sha256(data: bytes) -> str:
    """The digest of a file's bytes, as manifests and fleets write it."""
    return hashlib.sha256(data).hexdigest()


def trunk_digest(extractor_source: str, latent_dim: int, experts: int, outputs: int) -> str:
    """The identity that decides whether two devices' latents may meet: the extractor and the gate's schema.

    A gate's weights may be personal, and the extractor's precision may differ from board to board; the extractor
    that was trained, the latent's width and the numbers of experts and of outputs may not.
    """
    text = json.dumps([extractor_source, latent_dim, experts, outputs])
    return hashlib.sha256(text.encode()).digest()[:TRUNK_BYTES].hex()


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _require(self.bytes >= 0, f"bytes is {self.bytes}")
        _require(bool(_SHA256.fullmatch(self.sha256)), "sha256 is not 64 hexadecimal digits")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What one input is, and how an image becomes one."""

    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int, ...]
    """Of one row, without the batch."""
    layout: Literal["CHW", "HWC", "none"]
    """What the dimensions mean; `none` for what is no image."""
    resize: Literal["exact", "stretch", "crop"]
    """Of an image of another size: refused, stretched to the shape, or scaled to cover it and cut at the centre."""
    range: tuple[float, ...]
    """Lowest and highest value that a sensible input holds."""

    def __post_init__(self) -> None:
        _require(1 <= len(self.shape) <= MAX_DIMS, f"shape {list(self.shape)} has not one to {MAX_DIMS} dimensions")
        _require(min(self.shape) >= 1, f"shape {list(self.shape)} has an empty dimension")
        _require(self.layout == "none" or len(self.shape) == 3, f"layout {self.layout} needs three dimensions")
        _require(self.layout != "none" or self.resize == "exact", "what is no image is not resized")
        _require(len(self.range) == 2 and self.range[0] < self.range[1], "range is the lowest and the highest value")


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What travels between devices."""

    dim: int
    dtype: Literal["int8", "float16", "float32"]
    """On the wire; int8 has a scale for each row."""

    def __post_init__(self) -> None:
        _require(self.dim >= 1, f"dim is {self.dim}")


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """How a row finds its experts, as it was chosen on held-out training data."""

    top_k: int
    combination: Literal["outputs", "probabilities"]
    """What is summed: the experts' outputs, or the softmax of each."""
    local_first: float | None = None
    """A row whose own expert is surer than this is answered at home; null: the gate alone decides."""
    adapt: bool = False
    """Whether the device's own class mix is to be estimated and multiplied in; needs answers without a prior."""

    def __post_init__(self) -> None:
        _require(1 <= self.top_k <= MAX_ANSWERED, f"top_k is {self.top_k}, not in 1..{MAX_ANSWERED}")
        sure = self.local_first
        _require(sure is None or 0 <= sure <= 1, f"local_first is {sure}, not in 0..1")


@dataclass(frozen=True, slots=True)
class PrecisionSpec:
    """What each graph computes in."""

    extractor: Literal["fp32", "fp16", "int8"]
    gate: Literal["fp32", "fp16", "int8"]
    expert: Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json."""

    schema: int
    device: str
    experts: int
    """In the whole fleet: the width of the gate."""
    expert: int
    """This device's."""
    outputs: int
    """Numbers in an answer: the classes, for a classifier."""
    answers_carry_prior: bool
    """Whether an expert's answer leans to the classes that it was trained on; false for logit-adjusted ones."""
    input: InputSpec
    latent: LatentSpec
    routing: RoutingSpec
    precision: PrecisionSpec
    target: Literal["any", "x86", "pi", "jetson"]
    """The profile that it was made for."""
    opset: int
    ir_version: int
    accuracy: Mapping[str, float]
    """What was measured at export, by name, as shares of one; empty when nothing could be."""
    extractor_source: str
    """Digest of the extractor as it was trained: of its weights and how it is built, not of any exported file."""
    trunk: str
    """trunk_digest of what stands above."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    digest: str = ""
    """sha256 of this file without these 64 characters: the identity of the whole bundle. Always the last key."""

    def __post_init__(self) -> None:
        _require(self.schema == SCHEMA, f"schema {self.schema} is unknown: this nmoe reads schema {SCHEMA}")
        check_device_name(self.device)
        _require(1 <= self.experts <= MAX_EXPERTS, f"experts is {self.experts}, not in 1..{MAX_EXPERTS}")
        _require(0 <= self.expert < self.experts, f"expert is {self.expert}, not in 0..{self.experts - 1}")
        _require(self.outputs >= 1, f"outputs is {self.outputs}")
        _require(self.routing.top_k <= self.experts, f"top_k is {self.routing.top_k} of {self.experts} experts")
        _require(not (self.routing.adapt and self.answers_carry_prior), "adapt needs answers that carry no prior")
        _require(bool(_SHA256.fullmatch(self.extractor_source)), "extractor_source is not 64 hexadecimal digits")
        expected = trunk_digest(self.extractor_source, self.latent.dim, self.experts, self.outputs)
        _require(self.trunk == expected, f"trunk is {self.trunk}, not {expected}")
        for name, share in self.accuracy.items():
            _require(bool(_MEASURE.fullmatch(name)) and 0 <= share <= 1, f"accuracy {name!r} is no share of one")
        for name in self.files:
            _require(name in REQUIRED + OPTIONAL, f"unknown file {name!r:.80}{nearest(name, REQUIRED + OPTIONAL)}")

    @property
    def trunk_bytes(self) -> bytes:
        """The trunk digest as messages carry it."""
        return bytes.fromhex(self.trunk)

    def render(self) -> bytes:
        """manifest.json."""
        return (json.dumps(to_plain(self), indent=2) + "\n").encode()

    def sealed(self, contents: Mapping[str, bytes]) -> Manifest:
        """With the sizes and digests of these files, and its own."""
        files = {name: FileEntry(len(data), sha256(data)) for name, data in sorted(contents.items())}
        unsealed = replace(self, files=files, digest="")
        return replace(unsealed, digest=sha256(unsealed.render()))


def parse_manifest(data: bytes) -> Manifest:
    """manifest.json, or ValueError: not JSON, not of this schema, or not as it was written."""
    plain = parse_json(data)
    if isinstance(plain, dict) and plain.get("schema", SCHEMA) != SCHEMA:
        # Before its keys are looked at: another schema has others.
        raise ValueError(f"schema {plain['schema']!r:.40} is unknown: this nmoe reads schema {SCHEMA}")
    manifest = from_plain(Manifest, plain)
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise ValueError(f"files does not list {', '.join(missing)}")
    seal = _SEAL.search(data)
    if (
        seal is None
        or manifest.digest.encode() != seal[1]
        or sha256(data[: seal.start(1)] + data[seal.end(1) :]) != manifest.digest
    ):
        raise ValueError("its digest differs: it was changed after it was written; copy or export it again")
    return manifest
