"""A linear classifier on frozen latents, from statistics that clients send once: federated LDA.

Each client sends its class counts, its class sums and Σ h hᵀ. The server computes the mean of every class and one
covariance within classes:

    score_k = μ_kᵀ Σ⁻¹ h - ½ μ_kᵀ Σ⁻¹ μ_k        Σ: shrunk towards a multiple of the identity

The scores are log-likelihoods up to a constant, so they favour no class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nmoe_train.data.clients import Part

SHRINKAGES = (0.01, 0.03, 0.1, 0.3)
"""Candidates for the weight of the identity in Σ; held-out rows choose."""


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What a client sends: sums over its samples, so that the server can add them up."""

    counts: Tensor
    """Samples of each class (K,)"""
    sums: Tensor
    """Sum of the latents of each class (K, d)"""
    products: Tensor
    """Σ h hᵀ over all samples (d, d)"""

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.counts + other.counts, self.sums + other.sums, self.products + other.products)


def statistics(h: Tensor, y: Tensor, classes: int) -> Statistics:
    """A client's statistics from its latents h (n, d) and labels y (n,), in double precision."""
    h = h.double()
    member = one_hot(y, classes).double()  # (n, K)
    return Statistics(member.sum(0), member.T @ h, h.T @ h)


@dataclass(frozen=True, slots=True, eq=False)
class LDA:
    """The classifier."""

    weight: Tensor
    """(K, d)"""
    bias: Tensor
    """(K,); minus infinity for a class without samples"""

    def scores(self, h: Tensor) -> Tensor:
        """(n, d) -> (n, K)"""
        return (h.double() @ self.weight.T + self.bias).float()


def fit(total: Statistics, shrinkage: float) -> LDA:
    """The classifier that the server computes from the sum of all clients' statistics."""
    dim = len(total.products)
    rows = total.counts.sum()
    means = total.sums / total.counts.clamp(min=1)[:, None]  # (K, d)
    within = (total.products - (means * total.counts[:, None]).T @ means) / rows  # (d, d)
    spread = within.trace() / dim
    covariance = (1 - shrinkage) * within + shrinkage * spread.clamp(min=1e-12) * torch.eye(dim, dtype=within.dtype)
    weight = torch.linalg.solve(covariance, means.T).T  # (K, d)
    bias = -0.5 * (weight * means).sum(1)
    return LDA(weight, bias.masked_fill(total.counts == 0, -torch.inf))


def best_fit(total: Statistics, held_out: Sequence[Part]) -> tuple[LDA, float]:
    """The classifier and the shrinkage with the most correct answers on held-out latents of all clients."""
    h = torch.cat([rows for rows, _ in held_out])
    y = torch.cat([labels for _, labels in held_out])
    fits = {shrinkage: fit(total, shrinkage) for shrinkage in SHRINKAGES}
    best = max(SHRINKAGES, key=lambda shrinkage: int((fits[shrinkage].scores(h).argmax(1) == y).sum()))
    return fits[best], best
