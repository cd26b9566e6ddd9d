"""The formulas of the paper, each a pure function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def shortened(z: Tensor, radius: float) -> Tensor:
    """Every row cut to ‖z‖ ≤ √μ, which bounds what one sample adds to a correlation matrix. (n, d); radius: μ"""
    return z * (radius**0.5 / z.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def correlation(z: Tensor) -> Tensor:
    """R = 1/n Σ z zᵀ. (n, d) -> (d, d)"""
    return z.T @ z / len(z)


def spectral_loss(one: Tensor, two: Tensor, alpha: float, others: Tensor) -> Tensor:
    """FedSC: -2 tr(R⁺) + α tr(R²) + 2 (1-α) tr(R C).

    one, two: two views of the same samples (B, d); others: C, the mean correlation matrix of the other clients (d, d).
    With α = qᵢ, the client's share of all samples, its gradient is that of the spectral loss over everybody's samples.
    """
    alike = (one * two).sum(1).mean()  # tr(R⁺)
    r = (correlation(one) + correlation(two)) / 2
    return -2 * alike + alpha * r.square().sum() + 2 * (1 - alpha) * (r * others).sum()


def of_the_others(matrices: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """C of each client: Σⱼ wⱼ Rⱼ / Σⱼ wⱼ over j ≠ i; zero for a client that is alone."""
    total, whole = sum(weights), sum(w * r for w, r in zip(weights, matrices, strict=True))
    return [
        (whole - w * r) / (total - w) if len(matrices) > 1 else torch.zeros_like(r)
        for w, r in zip(weights, matrices, strict=True)
    ]


def mixture_loss(log_g: Tensor, said: Tensor, y: Tensor, kind: str) -> Tensor:
    """-log of the mixture's probability of the truth, for each row. log_g: (…, N), y: (…)

    outputs:        said (…, N, K) are the experts' outputs, mixed and then made a probability, as in the paper
    probabilities:  said (…, N) are the experts' log-probabilities of the truth
    """
    if kind == "probabilities":
        return -(log_g + said).logsumexp(-1)
    mixed = (log_g.exp()[..., None] * said).sum(-2)  # (…, K)
    return cross_entropy(mixed.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


def load_loss(g: Tensor, present: Tensor) -> Tensor:
    """Switch: N · Σ f̄ⱼ P̄ⱼ, f̄ the share of rows whose favourite is j, P̄ the mean of gⱼ; 1 when balanced.

    g: (…, B, N); present: (…, B), one for a row, zero for padding
    """
    share = present / present.sum(-1, keepdim=True)
    favourite = torch.nn.functional.one_hot(g.argmax(-1), g.shape[-1]).to(g)
    return g.shape[-1] * ((favourite * share[..., None]).sum(-2) * (g * share[..., None]).sum(-2)).sum(-1)
