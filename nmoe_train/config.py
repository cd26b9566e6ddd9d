"""Every setting of a training with its default.

`nmoe-train settings` prints the docstrings of the fields as comments (settings.py); recipes.py says how defaults,
recipe, file and flags combine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nmoe_train.nets import NetSpec

_COUNT = (1, 10**6)
_POSITIVE = (1e-12, 1e30)
_SHARE = (1e-9, 1)
_MAX_FULL = 1024
"""With longer latents a covariance takes over 2 MB per client."""


def _check(section: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a setting that is out of its range; None passes, because it stands for "not set"."""
    for name, (low, high) in ranges.items():
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be in {_plain(low)}..{_plain(high)}")


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and bound < 1e15 else f"{bound:g}"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The data set, and how it is distributed among the clients."""

    name: str = "digits"
    """"digits", a torchvision set such as "cifar10" or "mnist", "npz:FILE" or "folder:DIR"; RUN.md lists all."""
    clients: int = 10
    """Number of clients, and so of experts (m = n in the paper): 1 to 1024."""
    partition: str = "noniid:0.2"
    """Classes of each client. "iid": all alike; "noniid:TAU": its own class has the share 1/(1+TAU), the paper's τ;
    "noniid-text:TAU": the share 1-TAU; "dirichlet:A": drawn from Dirichlet(A); "classes:C": C classes per client."""
    test_partition: str | None = None
    """The partition of each client's own test samples. Not set: the same as `partition`."""
    train_size: int | None = None
    """Samples per client, held-out ones included. Not set: the most possible; CIFAR-10: up to 2500, as in the paper."""
    test_size: int | None = None
    """Samples in each client's own test set. Not set: the most possible; CIFAR-10: up to 1000, as in the paper."""
    held_out: float = 0.125
    """Share of a client's samples, 0 to 1, kept out of training: for the local_first threshold and int8 calibration."""

    def __post_init__(self) -> None:
        _check(self, {"clients": (1, 1024), "train_size": (2, 10**9), "test_size": (1, 10**9)})
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be over 0 and under 1")


@dataclass(frozen=True, slots=True)
class ExtractorConfig:
    """Stage 1: the shared feature extractor F, trained by federated SGD."""

    method: Literal["fedce", "fedsc"] = "fedce"
    """FedCE trains a classifier and needs labels; FedSC is self-supervised and needs none (see [fedsc])."""
    backbone: str = "small"
    """The network: "small", "resnet9", "resnet18", or "package.module:factory" for one of your own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the backbone: all for one of your own, else added to those that nmoe-train passes."""
    dim: int = 64
    """Numbers in a latent, d."""
    head: Literal["expert", "linear"] = "expert"
    """FedCE's head H, the predictor on top of F. "expert": the layers of an expert; "linear": one linear layer."""
    heads: Literal["shared", "local"] = "shared"
    """FedCE. "shared": the head is averaged like the extractor; "local": each client keeps its own (paper, eq. 2)."""
    loss: Literal["plain", "adjusted"] = "plain"
    """FedCE's cross-entropy: "plain" as in the paper; "adjusted" adds the log of the class mix to the logits."""
    correction: Literal["none", "scaffold"] = "none"
    """FedCE. "scaffold": every step is corrected for the client's drift (SCAFFOLD); clients send twice the bytes."""
    views: Literal["none", "shift", "light", "crop", "strong"] = "none"
    """FedCE: random changes of training images. "shift": moved by up to 1/8; "light": moved, mirrored; "crop": a part,
    1/2 to all of the area; "strong": a part, 1/5 to all of the area, mirrored and recoloured."""
    rounds: int = 20
    """Federated rounds."""
    local_epochs: int = 2
    """Passes of a client over its samples in one round."""
    batch: int = 20
    """Samples per gradient step."""
    rate: float = 0.05
    """Learning rate at its peak; it falls to 0 along a cosine."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 3.0
    """Longer gradients are scaled down to this length."""
    warm_rounds: int = 2
    """Rounds in which the learning rate rises to its peak."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers of the networks' arithmetic; weights stay float32. "auto": bfloat16 on a GPU, float32 on a CPU."""
    share: float = 1.0
    """Share of clients that train in a round, over 0 and up to 1."""
    drop: float = 0.0
    """Probability, 0 to 0.999, that a client drops out of a round; its update is then missing from the average."""
    step_limit: int | None = None
    """Most batches of a client per round, so that a large client does not delay the round. Not set: no limit."""

    def __post_init__(self) -> None:
        _check(self, {"dim": _COUNT, "rounds": _COUNT, "batch": _COUNT, "step_limit": _COUNT})
        _check(self, {"local_epochs": (0, 10**6), "warm_rounds": (0, 10**6), "share": _SHARE, "drop": (0, 0.999)})
        _check(self, {"rate": _POSITIVE, "momentum": (0, 1), "weight_decay": (0, 1e9), "clip": _POSITIVE})
        if self.correction == "scaffold" and (self.method, self.heads) != ("fedce", "shared"):
            raise ValueError("correction = 'scaffold' needs method = 'fedce' and heads = 'shared'")
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments must be JSON values, because a run stores them as JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class FedSCConfig:
    """Stage 1 with extractor.method = "fedsc": settings of FedSC alone."""

    radius: float = 4.0
    """μ: projections longer than √μ are cut to that length."""
    alpha: float = 0.2
    """α, weight of a client's own correlations, in the last round; it falls linearly from 1. See `own_weight`."""
    own_weight: Literal["falling", "share"] = "falling"
    """"falling": α falls from 1 to `alpha`; "share": α is q_i, the client's share of all samples (paper, eq. 4)."""
    views: Literal["shift", "light", "crop", "strong"] = "strong"
    """Random changes that make two views of an image, as in extractor.views; "strong" is FedSC's own."""
    projector: int = 128
    """Width of the projector's hidden layer; its output has extractor.dim numbers."""
    matrix_views: int = 5
    """Views of each sample over which a client averages its correlation matrix R."""
    sigma: float | None = None
    """σ of the noise on R's diagonal, σ/√2 on other entries. Not set: chosen to meet `epsilon`; without it no noise."""
    epsilon: float | None = None
    """ε, privacy budget of all rounds together. With `sigma`, stage 1 ends before it exceeds ε. Not set: no budget."""
    delta: float = 1e-5
    """δ: (ε, δ)-differential privacy protects the replacement of one sample of a client."""

    def __post_init__(self) -> None:
        _check(self, {"radius": _POSITIVE, "alpha": (0, 1), "projector": _COUNT, "matrix_views": _COUNT})
        _check(self, {"sigma": (1e-12, 1e9), "epsilon": (1e-3, 1e5), "delta": (1e-300, 0.5)})


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Stage 2: one personal expert per client, trained on the frozen extractor's latents."""

    widths: tuple[int, ...] = (64, 32, 32)
    """Widths of the hidden layers; three of them make the paper's four-layer MLP."""
    loss: Literal["plain", "adjusted"] = "adjusted"
    """Cross-entropy: "plain" as in the paper; "adjusted" adds the log of the class mix to the logits."""
    start: Literal["head", "fresh"] = "head"
    """Initial weights: FedCE's head, or fresh ones."""
    epochs: int = 30
    """Passes over the samples of the largest client; smaller clients repeat theirs. 0 keeps FedCE's head as it is."""
    batch: int = 20
    """Samples per gradient step."""
    rate: float = 2e-4
    """Initial learning rate of AdamW. Fresh experts need 2e-3, at which experts that start from the head forget it."""
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check(self, {"epochs": (0, 10**6), "batch": _COUNT, "rate": _POSITIVE, "weight_decay": (0, 1e9)})
        if not self.epochs and self.start == "fresh":
            raise ValueError("epochs = 0 would leave fresh experts untrained; set start = 'head'")
        if not self.widths:
            raise ValueError("widths is empty; an expert needs at least one hidden layer, for example [64]")
        _check_widths(self.widths)


def _check_widths(widths: tuple[int, ...]) -> None:
    if widths and min(widths) < 1:
        raise ValueError(f"widths are {list(widths)}; each must be at least 1")


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Stage 3: the gate G, which picks the experts for a latent."""

    method: Literal["rangate", "rollgate", "fedgate", "statgate"] = "statgate"
    """RanGate draws at random; RollGate learns which client a latent comes from; FedGate learns by FedAvg; StatGate is
    assembled from what each client publishes once about its latents."""
    widths: tuple[int, ...] = ()
    """Widths of hidden layers; none makes the paper's linear gate."""
    own: Literal["nothing", "bias", "weights"] = "nothing"
    """FedGate: the part of the gate that a device adds to the shared scores and never sends; other gates have none.
    It makes a device prefer its own expert: better on its own distribution, worse on balanced rows."""
    loss: Literal["outputs", "probabilities", "expected"] = "probabilities"
    """What is combined, in training and on devices: the experts' outputs (the paper) or their probabilities.
    "expected": FedGate learns to draw an expert of small loss; devices combine probabilities."""
    rounds: int = 300
    """FedGate: federated rounds."""
    local_steps: int = 1
    """FedGate: gradient steps of a client in one round."""
    batch: int = 64
    """Samples per gradient step."""
    rate: float = 1.0
    """Learning rate at its peak; it falls to 0 along a cosine. With step = "unit" it is the length of a step."""
    step: Literal["unit", "clipped"] = "unit"
    """Gradient normalisation. "unit": every gradient is scaled to length 1; "clipped": only longer ones."""
    noise: float = 0.1
    """FedGate: standard deviation of the noise added to the scores in training, the paper's ε."""
    train_top_k: int | None = None
    """FedGate: experts that a row is mixed from in training, 2 or more, as in the paper. Not set: all of them."""
    load_loss: float = 0.0
    """FedGate: weight of the load balance loss L_load, which spreads rows over the experts."""
    share: float = 0.7
    """FedGate: share of clients that train in a round, over 0 and up to 1; 0.7 in the paper."""
    drop: float = 0.0
    """FedGate: probability, 0 to 0.999, that a client drops out of a round."""
    shares: tuple[float, ...] | None = None
    """RanGate: probability of each expert, one number per client, in total 1. Not set: all equal."""
    roll_own: float = 0.7
    """RollGate: probability that a sample is labelled with its own client, the paper's p."""
    order: Literal["ring", "shuffled"] = "ring"
    """RollGate: order of the clients in a lap. "ring": by number; "shuffled": a new random order in every lap."""
    laps: int = 30
    """RollGate: how often the gate visits every client."""
    statistics: Literal["means", "moments"] = "means"
    """StatGate: what a client publishes. "means": share and mean of each class; "moments": one mean, without labels.
    Both with a covariance."""
    shrink: float = 0.5
    """StatGate: how far each client's covariance is moved towards that of all, 0 to 1; at 1 the gate is linear."""
    ridge: float = 0.03
    """StatGate: share of the mean variance that is added to every variance."""
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    """StatGate: "diagonal" publishes variances alone; "auto" does so for latents of more than 1024 numbers."""
    rank: int = 64
    """StatGate: most directions in which the gate lets a client's covariance differ from that of all."""
    temperature: float | None = None
    """StatGate: divides the scores, for the weights of several experts. Not set: chosen on held-out rows."""
    epsilon: float | None = None
    """StatGate: ε, privacy budget of the published statistics, which get noise to meet it. Not set: no noise."""
    delta: float = 1e-5
    """StatGate: δ: (ε, δ)-differential privacy protects the replacement of one training sample of a client."""
    radius: float | None = None
    """StatGate with `epsilon`: latents of a greater squared length are cut to it. Not set: extractor.dim."""

    def __post_init__(self) -> None:
        _check(self, {"rounds": _COUNT, "local_steps": _COUNT, "batch": _COUNT, "laps": _COUNT, "rate": _POSITIVE})
        _check(self, {"noise": (0, 1e9), "load_loss": (0, 1e9), "share": _SHARE, "drop": (0, 0.999)})
        _check(self, {"roll_own": (0, 1), "shrink": (0, 1), "ridge": (1e-6, 1e3), "rank": _COUNT})
        _check(self, {"train_top_k": (2, 10**6)})
        _check(self, {"temperature": (1e-3, 1e6), "epsilon": (1e-3, 1e5), "delta": (1e-300, 0.5), "radius": _POSITIVE})
        _check_widths(self.widths)
        if self.widths and self.own == "weights":
            raise ValueError("own = 'weights' needs a linear gate; set widths = []")
        if self.method == "statgate" and self.own != "nothing":
            raise ValueError(f"own = {self.own!r} is trained, and StatGate trains nothing; set own = 'nothing'")
        if self.shares is not None and not (min(self.shares, default=0) > 0 and abs(sum(self.shares) - 1) < 1e-6):
            raise ValueError(f"shares are {list(self.shares)}; each must be over 0, and they must sum to 1")

    @property
    def combination(self) -> Literal["outputs", "probabilities"]:
        """What devices combine."""
        return "outputs" if self.loss == "outputs" else "probabilities"

    def is_diagonal(self, dim: int) -> bool:
        """StatGate: whether clients publish variances instead of covariances."""
        return self.covariance == "diagonal" or (self.covariance == "auto" and dim > _MAX_FULL)

    def statgate_shape(self, dim: int, classes: int) -> dict[str, Any]:
        """StatGate: arguments of the network that depend on the settings."""
        diagonal = self.is_diagonal(dim)
        same_covariance = self.shrink == 1
        return {
            "groups": classes if self.statistics == "means" else 1,
            "rank": 0 if diagonal or same_covariance else min(self.rank, dim),
            "diagonal": diagonal and not same_covariance,
        }


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """How a device answers a row; also how the run is evaluated."""

    top_k: int = 1
    """Experts that a row is sent to: 1 to data.clients, the paper's k."""
    local_first: bool = True
    """Whether the device answers a row alone if its own expert is confident; held-out samples choose the threshold."""
    novelty: bool = True
    """Whether such a row's latent must also be familiar: near those that the client trained on."""
    calibrate: bool = True
    """Whether experts get a temperature and a bias per class, fitted on held-out samples of all clients."""
    adapt: bool = True
    """Whether a device may multiply in its own class mix, estimated from its requests. It does where no accuracy on
    held-out samples falls. Needs experts.loss "adjusted" or inference.calibrate."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one training. A wrong or contradictory setting raises ValueError.

        from nmoe_train import Config
        from nmoe_train.config import DataConfig

        Config(seed=1, data=DataConfig(clients=5))  # five clients on scikit-learn's digits, all else by default

    `recipes.configure` builds a Config from a recipe, a file and flags, and raises ConfigError instead.
    """

    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stage 1 trains; "auto" takes the GPU if there is one. Stages 2 and 3 train on the CPU."""
    threads: int = 1
    """CPU threads, 1 to 256. Another number sums in another order, which changes the last bits of results."""
    data: DataConfig = field(default_factory=DataConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    fedsc: FedSCConfig = field(default_factory=FedSCConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        _check(self, {"seed": (0, 2**31), "threads": (1, 256)})
        clients = self.data.clients
        has_expert_head = self.extractor.method == "fedce" and self.extractor.head == "expert"
        asks_for_privacy = self.fedsc.epsilon is not None or self.fedsc.sigma is not None
        if self.inference.adapt and self.experts.loss == "plain" and not self.inference.calibrate:
            raise ValueError("inference.adapt needs experts.loss = 'adjusted' or inference.calibrate; set it to false")
        if not 1 <= self.inference.top_k <= clients:
            raise ValueError(f"inference.top_k is {self.inference.top_k}; it must be in 1..{clients}, data.clients")
        if self.experts.start == "head" and not has_expert_head:
            raise ValueError("experts.start = 'head' needs extractor.method = 'fedce' and extractor.head = 'expert'")
        if self.extractor.method != "fedsc" and asks_for_privacy:
            raise ValueError("fedsc.epsilon and fedsc.sigma protect FedSC's matrices; set extractor.method = 'fedsc'")
        if self.gate.shares is not None and len(self.gate.shares) != clients:
            raise ValueError(f"gate.shares has {len(self.gate.shares)} numbers for {clients} experts; give one each")
        if self.gate.method == "rollgate" and clients < 2:
            raise ValueError("gate.method = 'rollgate' needs two clients, to label samples with the other one")

    def expert_net(self, classes: int) -> NetSpec:
        """The network of an expert, Hᵢ."""
        return NetSpec("mlp", {"dim": self.extractor.dim, "outputs": classes, "widths": list(self.experts.widths)})

    def head_net(self, classes: int) -> NetSpec:
        """What stage 1 trains on top of the extractor: FedSC's projector, or FedCE's head (an expert or one layer)."""
        dim = self.extractor.dim
        if self.extractor.method == "fedsc":
            return NetSpec("mlp", {"dim": dim, "outputs": dim, "widths": [self.fedsc.projector]})
        if self.extractor.head == "expert":
            return self.expert_net(classes)
        return NetSpec("linear", {"dim": dim, "outputs": classes})

    def gate_net(self, classes: int) -> NetSpec:
        """The shared part of the gate, G."""
        n = self.data.clients
        sizes = {"dim": self.extractor.dim, "outputs": n}
        if self.gate.method == "statgate":
            return NetSpec("statgate", {**sizes, **self.gate.statgate_shape(self.extractor.dim, classes)})
        if self.gate.method == "rangate":
            return NetSpec("random", {**sizes, "shares": list(self.gate.shares or [1 / n] * n)})
        if self.gate.widths:
            return NetSpec("mlp", {**sizes, "widths": list(self.gate.widths)})
        return NetSpec("linear", sizes)
