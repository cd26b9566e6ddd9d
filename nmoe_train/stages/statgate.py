"""StatGate: a gate that every device assembles from what each client publishes once about its latents.

    score of expert i = log Σₖ πᵢₖ N(h; μᵢₖ, Sᵢ)         Sᵢ = (1 - s) Cᵢ + s Σ,   Σ = Σᵢ qᵢ Cᵢ + ridge

πᵢₖ, μᵢₖ and Cᵢ are client i's group shares, means and covariance within groups (statistics.py), qᵢ its share of all
rows, and s is gate.shrink. Nothing is trained, no expert leaves its device, and one exchange is enough:

    means      groups are the client's classes
    moments    all rows are one group, and no label is used

A client's number of rows is not a prior: a row should go to the expert that knows it, not to the largest client.
With s = 1 all share one covariance: the scores are linear before the logarithm, and the gate is small.

A constant and log N(h; c, Σ)'s quadratic part are the same for all experts and are left out. In directions scaled by Σ,
Sᵢ differs from 1 along its eigenvectors; the `rank` eigenvectors that matter most are kept, the others count as 1.

The scores are log-likelihoods, far too sure of themselves for weights, because latents are not Gaussian. A temperature
divides them: the one under which held-out rows are most likely to come from the client that they do come from. A client
needs the statistics and its own rows for that, and no expert.

A new device joins by one more row of statistics: `assemble` again, with one client more. The others send nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nmoe_train.config import GateConfig
from nmoe_train.errors import RunError
from nmoe_train.nets import NetSpec, build
from nmoe_train.stages.federation import Round, size_bytes
from nmoe_train.stages.statistics import Statistics, epsilon_of_release, to_state
from nmoe_train.stages.weights import copy_state

TEMPERATURES = tuple(2 ** (step / 2) for step in range(-4, 17))
"""Those that are tried: 0.25 to 256."""
ABSENT = -1e4
"""Instead of log 0, for a group that a client does not have: far below any other score, and finite."""


def network(published: Sequence[Statistics], config: GateConfig) -> NetSpec:
    """The network that `assemble` makes the weights of."""
    groups, dim = published[0].means.shape
    return NetSpec("statgate", {"dim": dim, "outputs": len(published), **config.statgate_shape(dim, groups)})


def assemble(published: Sequence[Statistics], config: GateConfig, temperature: float = 1.0) -> dict[str, Tensor]:
    """The weights of the gate.

    RunError when clients' statistics differ in shape, or when no latent varies.
    """
    shapes = {(one.means.shape, one.spread.shape) for one in published}
    if len(shapes) != 1:
        raise RunError("clients published statistics of different shapes; use the same extractor and settings on all")
    weights = torch.tensor([one.rows for one in published]).double()
    weights = weights / weights.sum()
    center = sum(w * (one.shares @ one.means).double() for w, one in zip(weights, published, strict=True))
    pooled = sum(w * one.spread.double() for w, one in zip(weights, published, strict=True))
    is_diagonal = pooled.ndim == 1
    level = (pooled if is_diagonal else pooled.diagonal()).mean()
    if not level > 1e-12 * center.square().mean():  # less is rounding
        raise RunError(
            "the latents of every client are all equal within their groups, so there is no covariance to assemble a"
            " gate from; give clients more samples, train the extractor longer, or use another gate"
        )
    one = _diagonal_expert if is_diagonal else _expert
    ridge = config.ridge * level
    pooled = pooled + (ridge if is_diagonal else ridge * torch.eye(len(pooled)))
    parts = [one(client, pooled, ridge, center, config) for client in published]
    state = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    state = {key: value.flatten(0, 1) if key in ("weight", "directions") else value for key, value in state.items()}
    state["bias"] = state["bias"].flatten()
    state["center"] = center
    state["sharpness"] = torch.tensor(1 / temperature)
    return {key: value.float().contiguous() for key, value in state.items()}


def _expert(client: Statistics, pooled: Tensor, ridge: Tensor, center: Tensor, config: GateConfig) -> dict[str, Tensor]:
    """One expert's part of the gate, from covariances."""
    values, vectors = torch.linalg.eigh(pooled)
    scaled = vectors / values.sqrt()  # (d, d): h @ scaled has covariance 1 under Σ
    means = (client.means.double() - center) @ scaled  # (G, d)
    shrink = config.shrink
    rank = 0 if shrink == 1 else min(config.rank, len(pooled))
    inverse = torch.zeros(rank).double()  # of Sᵢ, less 1
    kept = torch.zeros(len(pooled), rank).double()
    log_det = torch.zeros(()).double()
    if rank:
        own = client.spread.double() + ridge * torch.eye(len(pooled))
        values, vectors = torch.linalg.eigh((1 - shrink) * scaled.T @ own @ scaled + shrink * torch.eye(len(pooled)))
        _require_invertible(values)
        most = (values - 1 - values.log()).topk(rank).indices.sort().values
        inverse = 1 / values[most] - 1
        kept = vectors[:, most]  # (d, rank)
        log_det = values[most].log().sum()
    solved = means + (means @ kept * inverse) @ kept.T  # Sᵢ⁻¹ μᵢₖ, (G, d)
    return {
        "weight": solved @ scaled.T,
        "bias": _group_bias(client, (means * solved).sum(1), log_det),
        "directions": ((inverse.abs() / 2).sqrt() * kept).T @ scaled.T,  # (rank, d)
        "signs": -inverse.sign(),
    }


def _diagonal_expert(
    client: Statistics, pooled: Tensor, ridge: Tensor, center: Tensor, config: GateConfig
) -> dict[str, Tensor]:
    """One expert's part of the gate, from variances: the quadratic part is a weight for each squared number."""
    shrink = config.shrink
    variances = (1 - shrink) * (client.spread.double() + ridge) + shrink * pooled
    _require_invertible(variances)
    means = client.means.double() - center
    solved = means / variances
    part = {"weight": solved, "bias": _group_bias(client, (means * solved).sum(1), variances.log().sum())}
    if shrink == 1:  # the quadratic part is the same for all
        return part | {"directions": torch.zeros(0, len(pooled)), "signs": torch.zeros(0)}
    return part | {"squares": (1 / pooled - 1 / variances) / 2}


def _group_bias(client: Statistics, lengths: Tensor, log_det: Tensor) -> Tensor:
    """The constant of each group's score. lengths: μᵢₖᵀ Sᵢ⁻¹ μᵢₖ (G,)"""
    constant = client.shares.double().log() - lengths / 2 - log_det / 2
    return torch.where(client.shares > 0, constant, ABSENT)


def _require_invertible(values: Tensor) -> None:
    if not bool((values > 1e-9).all()):
        raise RunError(
            "a client's covariance is singular: it has fewer rows than its latents have numbers;"
            " raise gate.shrink or gate.ridge"
        )


def gate_of(published: Sequence[Statistics], config: GateConfig, temperature: float = 1.0) -> nn.Module:
    """The gate as a network: latents (n, d) -> scores (n, N)."""
    net = build(network(published, config))
    net.load_state_dict(assemble(published, config, temperature))
    return net


def fit_temperature(scores: Tensor, clients: Tensor) -> float:
    """The temperature under which the softmax of these scores (n, N) says best which client a row is from (n,)."""
    losses = [float(cross_entropy(scores / temperature, clients)) for temperature in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def statgate_round(
    published: Sequence[Statistics], held_out: Sequence[Tensor], config: GateConfig
) -> tuple[dict[str, Tensor], Round]:
    """The one round of StatGate: the gate's weights, and what was exchanged.

    held_out: latents of each client, which choose the temperature
    """
    gate = gate_of(published, config)
    with torch.no_grad():
        scores: Tensor = gate(torch.cat(list(held_out)))
    clients = torch.repeat_interleave(torch.arange(len(held_out)), torch.tensor([len(h) for h in held_out]))
    temperature = fit_temperature(scores, clients) if config.temperature is None else config.temperature
    state = copy_state(gate) | {"sharpness": torch.tensor(1 / temperature)}
    # Every client sends its statistics, then its loss at each temperature; it gets the others' statistics.
    sizes = [size_bytes(to_state(one)) for one in published]
    fitted = 4 * len(TEMPERATURES) * len(published) if config.temperature is None else 0
    dim = published[0].means.shape[1]
    return state, Round(
        "gate",
        1,
        1,
        loss=float(cross_entropy(scores / temperature, clients)),
        accuracy=float((scores.argmax(1) == clients).double().mean()),
        up=sum(sizes) + fitted,
        down=(len(sizes) - 1) * sum(sizes) + 4 * len(sizes) * (config.temperature is None),
        epsilon=epsilon_of_release(config, [one.rows for one in published], dim),
    )
