"""Every setting of a training, each default in one place.

A TOML file overrides a recipe, a recipe the defaults, and flags override all. Unknown keys are refused by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nmoe_edge.common.schema import from_plain, parse_json, to_plain
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
            raise ValueError(f"{name} is {value}, not in {_plain(low)}..{_plain(high)}")


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and bound < 1e15 else f"{bound:g}"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is trained on, and who has what."""

    name: str = "digits"
    clients: int = 10
    partition: str = "noniid:0.2"
    """See partition.py."""
    test_partition: str | None = None
    """Of each client's own test samples; null: like its training samples."""
    train_size: int | None = None
    """Samples a client; null: as many as the split allows, for CIFAR-10 at most the paper's 2500."""
    test_size: int | None = None
    """The same for its own test set; for CIFAR-10 at most the paper's 1000."""
    held_out: float = 0.125
    """Share of a client's training samples that no stage trains on: thresholds are chosen and int8 calibrated there."""

    def __post_init__(self) -> None:
        _check(self, {"clients": (1, 1024), "train_size": (2, 10**9), "test_size": (1, 10**9)})
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, not between 0 and 1")


@dataclass(frozen=True, slots=True)
class ExtractorConfig:
    """Stage 1: a shared extractor, supervised or self-supervised."""

    method: Literal["fedce", "fedsc"] = "fedce"
    backbone: str = "small"
    """A name of nets.REGISTRY, or package.module:factory."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the factory gets beside the shape of the images."""
    dim: int = 64
    """Numbers in a latent."""
    head: Literal["expert", "linear"] = "expert"
    """FedCE: whether the head that is taken off has an expert's layers, or is one linear layer."""
    heads: Literal["shared", "local"] = "shared"
    """FedCE: whether the head is averaged too, or stays with its client."""
    views: Literal["none", "shift", "light", "crop", "strong"] = "none"
    """FedCE: how images are varied while training; see augment.py."""
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
    drop: float = 0.0
    """The probability that one of them drops out of a round, and is left out of its average."""
    step_limit: int | None = None
    """Batches after which a client sends what it has, so that nobody waits for who has most; null: no limit."""

    def __post_init__(self) -> None:
        _check(
            self,
            {"dim": _COUNT, "rounds": _COUNT, "local_epochs": (0, 10**6), "batch": _COUNT, "warm_rounds": (0, 10**6)},
        )
        _check(self, {"rate": _POSITIVE, "momentum": (0, 1), "weight_decay": (0, 1e9), "clip": _POSITIVE})
        _check(self, {"share": _SHARE, "drop": (0, 0.999), "step_limit": _COUNT})
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments are kept as JSON, and this is none: {error}") from error


@dataclass(frozen=True, slots=True)
class FedSCConfig:
    """What FedSC has beside stage 1's own settings."""

    radius: float = 4.0
    """μ: projections are cut to length √μ."""
    alpha: float = 0.2
    """Weight of a client's own correlations in the last round; it falls from 1 in a straight line."""
    views: Literal["shift", "light", "crop", "strong"] = "strong"
    """How two views of an image are made; see augment.py."""
    projector: int = 128
    """Width of the projector's hidden layer; it ends with as many numbers as a latent has."""
    matrix_views: int = 5
    """Views of each sample that a client's correlation matrix is the mean of."""
    sigma: float | None = None
    """Standard deviation of the noise on every number of a matrix; null: none, or what epsilon asks for."""
    epsilon: float | None = None
    """Budget of all releases: it chooses sigma, or ends the stage when the given sigma has spent it."""
    delta: float = 1e-5
    """ε and δ hide whether one sample of a client was another one."""

    def __post_init__(self) -> None:
        _check(self, {"radius": _POSITIVE, "alpha": (0, 1), "projector": _COUNT, "matrix_views": _COUNT})
        _check(self, {"sigma": (1e-12, 1e9), "epsilon": (1e-3, 1e5), "delta": (1e-300, 0.5)})


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Stage 2: a personal expert on the frozen extractor's latents."""

    widths: tuple[int, ...] = (64, 32, 32)
    """Hidden layers: with three, the paper's four-layer MLP."""
    loss: Literal["plain", "adjusted"] = "adjusted"
    """Cross-entropy as it is, or of logits plus the log of the client's own class mix (logit adjustment)."""
    start: Literal["head", "fresh"] = "head"
    """From stage 1's head, or from new weights."""
    epochs: int = 30
    batch: int = 20
    rate: float = 2e-4
    """Ten times that for experts that start fresh: a faster one forgets the head that it starts from."""
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check(self, {"epochs": _COUNT, "batch": _COUNT, "rate": _POSITIVE, "weight_decay": (0, 1e9)})
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths are {list(self.widths)}, not numbers from 1 on")


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Stage 3: who is asked."""

    method: Literal["rangate", "rollgate", "fedgate"] = "fedgate"
    widths: tuple[int, ...] = ()
    """Hidden layers; none: the paper's linear gate."""
    own: Literal["nothing", "bias", "weights"] = "bias"
    """FedGate: what a device adds to the shared scores and keeps to itself (partial synchronisation)."""
    loss: Literal["outputs", "probabilities"] = "probabilities"
    """Whether the experts' outputs are mixed (the paper) or their probabilities; also at inference."""
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
    drop: float = 0.0
    """The probability that one of them drops out of a round."""
    shares: tuple[float, ...] | None = None
    """RanGate: how often each expert is chosen; null: all alike."""
    roll_own: float = 0.7
    """RollGate: the probability that a sample is labelled with its own client."""
    order: Literal["ring", "shuffled"] = "ring"
    """RollGate: whom the gate visits next."""
    laps: int = 10
    """RollGate: how often it visits everybody."""

    def __post_init__(self) -> None:
        _check(self, {"rounds": _COUNT, "local_steps": _COUNT, "batch": _COUNT, "laps": _COUNT, "rate": _POSITIVE})
        _check(self, {"noise": (0, 1e9), "load_loss": (0, 1e9), "share": _SHARE, "drop": (0, 0.999)})
        _check(self, {"roll_own": (0, 1)})
        if self.widths and min(self.widths) < 1:
            raise ValueError(f"widths are {list(self.widths)}, not numbers from 1 on")
        if self.widths and self.own == "weights":
            raise ValueError("own = 'weights' needs a linear gate: widths = []")
        if self.shares is not None and not (min(self.shares, default=0) > 0 and abs(sum(self.shares) - 1) < 1e-6):
            raise ValueError(f"shares are {list(self.shares)}, not numbers over 0 that sum to 1")


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """What a device does with it."""

    top_k: int = 1
    local_first: bool = True
    """Whether a row stays at home when its own expert is sure enough: how sure, held-out training samples say."""
    adapt: bool = True
    """Whether the device estimates its own class mix from its traffic; needs adjusted experts."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole training."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trains stage 1; auto: cuda where there is one."""
    threads: int = 1
    """Of the CPU. Sums in another order differ in the last bits, so this belongs to the numbers."""
    data: DataConfig = field(default_factory=DataConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    fedsc: FedSCConfig = field(default_factory=FedSCConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        _check(self, {"seed": (0, 2**31), "threads": (1, 256)})
        if self.inference.adapt and self.experts.loss == "plain":
            raise ValueError("inference.adapt needs experts.loss = 'adjusted': to have plain ones, set it false")
        if not 1 <= self.inference.top_k <= self.data.clients:
            raise ValueError(f"inference.top_k is {self.inference.top_k}, not in 1..{self.data.clients}, the experts")
        if self.experts.start == "head" and not (self.extractor.method == "fedce" and self.extractor.head == "expert"):
            raise ValueError("experts.start = 'head' needs extractor.method = 'fedce' and extractor.head = 'expert'")
        if self.extractor.method != "fedsc" and (self.fedsc.epsilon, self.fedsc.sigma) != (None, None):
            raise ValueError("fedsc.epsilon and fedsc.sigma protect FedSC's matrices: add extractor.method = 'fedsc'")
        if self.gate.shares is not None and len(self.gate.shares) != self.data.clients:
            raise ValueError(f"gate.shares are {len(self.gate.shares)} for {self.data.clients} experts")
        if self.gate.method == "rollgate" and self.data.clients < 2:
            raise ValueError(
                "gate.method = 'rollgate' needs two clients: with one there is nobody to label samples with"
            )

    def expert_net(self, classes: int) -> NetSpec:
        """An expert."""
        return NetSpec("mlp", {"dim": self.extractor.dim, "outputs": classes, "widths": list(self.experts.widths)})

    def head_net(self, classes: int) -> NetSpec:
        """What stage 1 trains on top of the extractor: an expert, so that experts can start from it, or less, or P."""
        dim = self.extractor.dim
        if self.extractor.method == "fedsc":
            return NetSpec("mlp", {"dim": dim, "outputs": dim, "widths": [self.fedsc.projector]})
        return self.expert_net(classes) if self.extractor.head == "expert" else _linear(dim, classes)

    def gate_net(self) -> NetSpec:
        """The shared part of the gate."""
        dim, n = self.extractor.dim, self.data.clients
        if self.gate.method == "rangate":
            return NetSpec("random", {"dim": dim, "outputs": n, "shares": list(self.gate.shares or [1 / n] * n)})
        widths = list(self.gate.widths)
        return NetSpec("mlp", {"dim": dim, "outputs": n, "widths": widths}) if widths else _linear(dim, n)


def _linear(dim: int, outputs: int) -> NetSpec:
    return NetSpec("linear", {"dim": dim, "outputs": outputs})


RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "extractor": {"head": "linear"},
        "experts": {"loss": "plain", "start": "fresh", "rate": 2e-3},
        "gate": {"loss": "outputs", "own": "nothing", "load_loss": 0.01},
        "inference": {"local_first": False, "adapt": False},
    },
}
"""What a named recipe changes of the defaults: `best` is what they are."""

METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("fedsc", ""): {
        "extractor": {"batch": 512, "local_epochs": 5, "rounds": 200, "rate": 0.03},
        "experts": {"start": "fresh", "rate": 2e-3},
    },
    ("fedsc", "digits"): {
        "extractor": {"batch": 35, "local_epochs": 5, "rounds": 60, "rate": 0.1},
        "fedsc": {"views": "crop", "radius": 20.0},
    },
}
"""What a method of stage 1 changes of them: always, and for some data."""

DATA: dict[str, dict[str, Any]] = {
    "cifar10": {
        "extractor": {"dim": 128, "batch": 50, "rounds": 100, "views": "light"},
        "experts": {"widths": [128, 64, 64], "batch": 50},
        "fedsc": {"projector": 256},
    },
}
"""What data changes of them, which the defaults are too small for."""
DATA["fashion-mnist"] = DATA["cifar10"]


SECTIONS = ("data", "extractor", "fedsc", "experts", "gate", "inference")


def configure(recipe: str = "best", file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The defaults, changed by data, recipe and method, then by a file and flags (nested like the file), in this order.

    file: TOML, or a run.json, whose every setting is taken
    """
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
    try:
        given = _merged(_settings(file) if file is not None else {}, flags or {})
        plain = to_plain(Config())
        name, method = (_chosen(given, plain, *place) for place in (("data", "name"), ("extractor", "method")))
        methods = (METHODS.get((method, ""), {}), METHODS.get((method, name), {}))
        for changes in (DATA.get(name, {}), RECIPES[recipe], *methods, given):
            plain = _merged(plain, changes)
        return from_plain(Config, plain)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; --config takes a TOML file or a run.json") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from error


def configure_from(config: Config, flags: Mapping[str, Any]) -> Config:
    """A configuration with some settings changed; another method of stage 1 brings its own defaults."""
    plain = to_plain(config)
    try:
        method = _chosen(flags, plain, "extractor", "method")
        if method != config.extractor.method:
            usual = to_plain(configure(flags={"data": {"name": config.data.name}, "extractor": {"method": method}}))
            kept = {key: plain["extractor"][key] for key in ("backbone", "arguments", "dim")}
            start = {"start": "fresh", "rate": 2e-3} if method == "fedsc" else {}
            plain = _merged(
                plain, {"extractor": {**usual["extractor"], **kept}, "fedsc": usual["fedsc"], "experts": start}
            )
        return from_plain(Config, _merged(plain, flags))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _settings(file: Path) -> Mapping[str, Any]:
    if file.suffix != ".json":
        return tomllib.loads(file.read_text())
    plain = parse_json(file.read_bytes())
    if not (isinstance(plain, dict) and isinstance(plain.get("config"), dict)):
        raise ValueError("not a run.json: it holds no config")
    return plain["config"]


def _chosen(given: Mapping[str, Any], usual: Mapping[str, Any], section: str, name: str) -> str:
    """A setting that others' defaults depend on; what is no text is refused later."""
    table = given.get(section)
    return str((table if isinstance(table, Mapping) else {}).get(name, usual[section][name]))


def _merged(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(plain)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both_tables else value
    return merged
