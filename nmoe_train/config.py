"""Every setting of a training, each default in one place.

A TOML file overrides a recipe, a recipe the defaults, and flags override all. Unknown keys are refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nmoe_edge.schema import from_plain, to_plain
from nmoe_train.errors import ConfigError
from nmoe_train.nets import NetSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_COUNT = (1, 10**6)
_POSITIVE = (1e-12, 1e30)
_SHARE = (1e-9, 1)


def _check(section: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a setting that is out of its range; null is for what has a default of its own."""
    for name, (low, high) in ranges.items():
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, not in {low:g}..{high:g}")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is trained on, and who has what."""

    name: str = "digits"
    clients: int = 10
    partition: str = "noniid:0.2"
    """See partition.py."""
    train_size: int | None = None
    """Samples a client; null: as many as the split allows, for CIFAR-10 the paper's 2500."""
    test_size: int | None = None
    """The same for its own test set; for CIFAR-10 the paper's 1000."""
    held_out: float = 0.125
    """Share of a client's training samples that no stage trains on: thresholds are chosen and int8 calibrated there."""

    def __post_init__(self) -> None:
        _check(self, {"clients": (1, 1024), "train_size": (2, 10**9), "test_size": (1, 10**9)})
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, not between 0 and 1")


@dataclass(frozen=True, slots=True)
class ExtractorConfig:
    """Stage 1, FedCE: a whole classifier is averaged, then its head is taken off."""

    backbone: str = "small"
    """A name of nets.REGISTRY, or package.module:factory."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the factory gets beside the shape of the images."""
    dim: int = 64
    """Numbers in a latent."""
    heads: Literal["shared", "local"] = "shared"
    """Whether the head is averaged too, or stays with its client."""
    rounds: int = 20
    local_epochs: int = 2
    batch: int = 20
    rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 3.0
    """Longest gradient."""
    warm_rounds: int = 2
    """Rounds in which the rate rises, before the cosine takes it down."""
    share: float = 1.0
    """Of the clients, that train in a round."""

    def __post_init__(self) -> None:
        _check(
            self,
            {"dim": _COUNT, "rounds": _COUNT, "local_epochs": (0, 10**6), "batch": _COUNT, "warm_rounds": (0, 10**6)},
        )
        _check(
            self, {"rate": _POSITIVE, "momentum": (0, 1), "weight_decay": (0, 1e9), "clip": _POSITIVE, "share": _SHARE}
        )


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Stage 2: a personal expert on the frozen extractor's latents."""

    widths: tuple[int, ...] = (64, 32, 32)
    """Hidden layers: with three, the paper's four-layer MLP."""
    loss: Literal["plain", "adjusted"] = "adjusted"
    """Cross-entropy as it is, or of logits plus the log of the client's own class mix (logit adjustment)."""
    start: Literal["head", "fresh"] = "head"
    """From stage 1's shared head, or from new weights."""
    epochs: int = 30
    batch: int = 20
    rate: float = 2e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check(self, {"epochs": _COUNT, "batch": _COUNT, "rate": _POSITIVE, "weight_decay": (0, 1e9)})
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths are {list(self.widths)}, not numbers from 1 on")


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Stage 3: who is asked."""

    method: Literal["rangate", "rollgate", "fedgate"] = "fedgate"
    loss: Literal["outputs", "probabilities"] = "probabilities"
    """FedGate mixes the experts' outputs (the paper) or their probabilities."""
    synchronise: Literal["all", "weights"] = "weights"
    """What is averaged: everything, or all but each device's own bias (partial synchronisation)."""
    rounds: int = 100
    local_steps: int = 1
    batch: int = 64
    rate: float = 0.05
    step: Literal["unit", "clipped"] = "unit"
    """Gradients of length one, or at most one."""
    noise: float = 0.1
    """Standard deviation of what is added to the scores while training."""
    load_loss: float = 0.0
    """Weight of the Switch loss that spreads rows over experts."""
    share: float = 0.7
    """Of the clients, that train in a round."""
    roll_own: float = 0.7
    """RollGate: the probability that a sample is labelled with its own client."""
    laps: int = 10
    """RollGate: how often the gate goes round the ring."""

    def __post_init__(self) -> None:
        _check(self, {"rounds": _COUNT, "local_steps": _COUNT, "batch": _COUNT, "laps": _COUNT, "rate": _POSITIVE})
        _check(self, {"noise": (0, 1e9), "load_loss": (0, 1e9), "share": _SHARE, "roll_own": (0, 1)})


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """What a device does with it; thresholds are chosen on held-out training samples."""

    top_k: int = 1
    local_first: bool = True
    """Whether a row whose own expert is sure enough stays at home."""
    adapt: bool = True
    """Whether the device estimates its own class mix from its traffic; needs adjusted experts."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole training."""

    seed: int = 0
    threads: int = 1
    """Of the CPU. Sums in another order differ in the last bits, so this belongs to the numbers."""
    data: DataConfig = field(default_factory=DataConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        _check(self, {"seed": (0, 2**31), "threads": (1, 256)})
        if self.inference.adapt and self.experts.loss == "plain":
            raise ValueError("inference.adapt needs experts.loss = 'adjusted': plain answers carry a prior already")
        if not 1 <= self.inference.top_k <= self.data.clients:
            raise ValueError(f"inference.top_k is {self.inference.top_k} of {self.data.clients} experts")
        if self.experts.start == "head" and self.extractor.heads == "local":
            raise ValueError("experts.start = 'head' needs extractor.heads = 'shared'")

    def expert_net(self, classes: int) -> NetSpec:
        """An expert; stage 1's head is one too, so that experts can start from it."""
        return NetSpec("mlp", {"dim": self.extractor.dim, "outputs": classes, "widths": list(self.experts.widths)})

    def gate_net(self) -> NetSpec:
        """The paper's gate."""
        return NetSpec("linear", {"dim": self.extractor.dim, "outputs": self.data.clients})


RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "experts": {"loss": "plain"},
        "gate": {"loss": "outputs", "synchronise": "all", "load_loss": 0.01},
        "inference": {"local_first": False, "adapt": False},
    },
}
"""What a named recipe changes of the defaults: `best` is what they are."""


def configure(recipe: str = "best", file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The defaults, changed by a recipe, a TOML file and flags (nested like the file), in this order."""
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
    plain = _merged(to_plain(Config()), RECIPES[recipe])
    try:
        if file is not None:
            plain = _merged(plain, tomllib.loads(file.read_text()))
        return from_plain(Config, _merged(plain, flags or {}))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from error


def _merged(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(plain)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both_tables else value
    return merged
