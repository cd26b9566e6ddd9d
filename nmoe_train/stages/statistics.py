"""What a client publishes about its latents so that every device can assemble a gate (statgate.py).

    P = 1/n Σ u uᵀ,   u = (h, b · onehot(k))         h: a latent, k: its group, b: a constant

One matrix holds everything: the second moments of the latents, the share of each group and its mean. Groups are the
classes (gate.statistics = "means"), or all rows are one group (gate.statistics = "moments"), and then no label is used.
What is sent are the group shares and means and the covariance within groups, computed from P.

With gate.epsilon, P gets Gaussian noise once (privacy.py). Latents are first cut to a length of √radius, so |u|² is at
most radius + b², and replacing one training sample moves P by at most √2 (radius + b²) / n. We set b² = radius. This
protects the published statistics of training rows, and nothing else: not the experts' answers, nor held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from nmoe_train.config import GateConfig
from nmoe_train.errors import RunError
from nmoe_train.stages.federation import State, generator
from nmoe_train.stages.losses import cap_length
from nmoe_train.stages.privacy import epsilon_spent, noise_for


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """How one client's latents lie."""

    rows: int
    """n, training samples"""
    shares: Tensor
    """(G,): of each group; they sum to 1"""
    means: Tensor
    """(G, d): a group without rows has zeros"""
    spread: Tensor
    """Covariance within groups (d, d), or only its diagonal (d,)"""

    def __post_init__(self) -> None:
        """RunError for shapes that do not fit and for numbers that are not finite."""
        groups, dim = self.means.shape
        if self.shares.shape != (groups,) or self.spread.shape not in ((dim, dim), (dim,)):
            raise RunError(
                f"statistics of {list(self.shares.shape)} shares, {list(self.means.shape)} means and"
                f" {list(self.spread.shape)} covariances do not fit together"
            )
        if not all(bool(value.isfinite().all()) for value in (self.shares, self.means, self.spread)):
            raise RunError("the statistics of a client hold NaN or infinity; train its extractor again")
        if self.rows < 1 or self.shares.min() < 0 or self.shares.sum() <= 0:
            raise RunError("statistics need at least one row and one group with a share over 0")


def groups_of(config: GateConfig, classes: int) -> int:
    """G, the number of groups."""
    return classes if config.statistics == "means" else 1


def client_statistics(
    latents: Tensor, y: Tensor, classes: int, config: GateConfig, seed: int, client: int
) -> Statistics:
    """What one client publishes. latents: (n, d); y: (n,), unused with "moments"

    The noise comes from the run's seed so that a simulation can be repeated; real clients must draw their own.
    """
    if not len(latents):
        raise RunError(f"client {client} has no training rows, so it has no statistics; give it samples")
    h = latents.double()
    labels = y if config.statistics == "means" else torch.zeros(len(h), dtype=torch.long)
    groups = groups_of(config, classes)
    dim = h.shape[1]
    radius = radius_of(config, dim)
    sigma = noise_of(config, len(h), dim)
    if sigma:
        h = cap_length(h, radius)
    scale = math.sqrt(radius)  # b
    u = torch.cat([h, scale * torch.nn.functional.one_hot(labels, groups)], 1)  # (n, d + G)
    p = u.T @ u / len(h)
    if sigma:
        noise = torch.randn(p.shape, generator=generator(seed, "statistics", client), dtype=torch.float64) * sigma
        p = p + (noise + noise.T) / 2
    return _separate(p, dim, scale, len(h), sigma, config.is_diagonal(dim))


def _separate(p: Tensor, dim: int, scale: float, rows: int, sigma: float, diagonal: bool) -> Statistics:
    """The statistics that P (d + G, d + G) holds. Noise can make shares or variances negative: they become 0."""
    shares = p[dim:, dim:].diagonal() / scale**2
    floor = 3 * sigma / scale**2  # a share of less could be noise alone
    shares = torch.where(shares > floor, shares, 0.0)
    if not shares.any():
        shares = torch.ones_like(shares)
    sums = p[dim:, :dim] / scale  # (G, d)
    known = shares > 0
    means = torch.where(known[:, None], sums / shares.clamp(min=1e-12)[:, None], 0.0)
    spread = p[:dim, :dim] - means.T @ (shares[:, None] * means)
    if diagonal:
        spread = spread.diagonal().clamp(min=0)
    elif sigma:
        values, vectors = torch.linalg.eigh(spread)
        spread = (vectors * values.clamp(min=0)) @ vectors.T
    shares = shares / shares.sum()
    return Statistics(rows, shares.float(), means.float(), spread.float())


def radius_of(config: GateConfig, dim: int) -> float:
    """The largest squared length of a latent. Not set: d, the length that a LayerNorm gives every latent."""
    return config.radius if config.radius is not None else float(dim)


def _sensitivity(config: GateConfig, rows: int, dim: int) -> float:
    return math.sqrt(2) * 2 * radius_of(config, dim) / rows


def noise_of(config: GateConfig, rows: int, dim: int) -> float:
    """σ of the noise on P: as small as gate.epsilon allows for one release; 0 without a budget."""
    if config.epsilon is None:
        return 0.0
    return noise_for(config.epsilon, _sensitivity(config, rows, dim), 1, config.delta)


def epsilon_of_release(config: GateConfig, sizes: Sequence[int], dim: int) -> float | None:
    """ε of the client that spends most; None without noise, which protects nothing."""
    if config.epsilon is None:
        return None
    return max(
        epsilon_spent(_sensitivity(config, rows, dim), noise_of(config, rows, dim), 1, config.delta) for rows in sizes
    )


def to_state(statistics: Statistics) -> dict[str, Tensor]:
    """As sent and stored: of a covariance, which is symmetric, the upper triangle."""
    dim = statistics.means.shape[1]
    spread = statistics.spread
    if spread.ndim == 2:
        spread = spread[tuple(torch.triu_indices(dim, dim))]
    return {
        "rows": torch.tensor([statistics.rows]),
        "shares": statistics.shares,
        "means": statistics.means,
        "spread": spread,
    }


def from_state(state: State) -> Statistics:
    """What `to_state` packed. RunError when it does not fit together."""
    missing = {"rows", "shares", "means", "spread"} - state.keys()
    if missing or state["means"].ndim != 2 or state["rows"].numel() != 1:
        raise RunError(f"statistics lack {', '.join(sorted(missing)) or 'rows of means'}")
    dim = state["means"].shape[1]
    spread = state["spread"]
    if spread.shape == (dim * (dim + 1) // 2,) and dim > 1:
        upper, across = torch.triu_indices(dim, dim)
        full = torch.zeros(dim, dim)
        full[upper, across] = spread
        full[across, upper] = spread
        spread = full
    return Statistics(int(state["rows"]), state["shares"], state["means"], spread)


def as_arrays(published: Sequence[Statistics]) -> dict[str, NDArray[Any]]:
    """The statistics of all clients as one file holds them, each array (N, …)."""
    states = [to_state(one) for one in published]
    return {key: torch.stack([state[key] for state in states]).numpy() for key in states[0]}


def from_arrays(arrays: Mapping[str, NDArray[Any]], clients: int, dim: int) -> list[Statistics]:
    """What `as_arrays` made. RunError when it does not fit."""
    if any(len(array) != clients for array in arrays.values()):
        raise RunError(f"expected the statistics of {clients} clients")
    states = [{key: torch.from_numpy(array[i]) for key, array in arrays.items()} for i in range(clients)]
    found = [from_state(state) for state in states]
    if found[0].means.shape[1] != dim:
        raise RunError(f"expected statistics of latents of {dim} numbers; they are of {found[0].means.shape[1]}")
    return found
