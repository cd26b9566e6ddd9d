"""The formulae of the paper, and of FedSC which it builds on, as pure functions of tensors.

n: rows, d: numbers of a latent or projection, B: rows of a batch, N: experts, K: classes. "…" stands for leading
dimensions, such as clients that are trained together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

SMOOTHING = 0.5
"""Added to every class count, so that a class a client has never seen keeps a small prior instead of zero."""


def class_prior(y: Tensor, classes: int) -> Tensor:
    """π, the smoothed class mix of these labels. (n,) -> (K,)"""
    counts = torch.bincount(y, minlength=classes) + SMOOTHING
    return counts / counts.sum()


def cap_length(z: Tensor, radius: float) -> Tensor:
    """Every row scaled down to length √μ if it is longer; μ is `radius`. (n, d) -> (n, d)

    This bounds how far one sample can move a correlation matrix, which differential privacy requires.
    """
    factor = radius**0.5 / z.norm(dim=1, keepdim=True).clamp(min=1e-12)  # (n, 1)
    return z * factor.clamp(max=1)


def correlation(z: Tensor) -> Tensor:
    """R = 1/n Σ z zᵀ. (n, d) -> (d, d)"""
    return z.T @ z / len(z)


def spectral_loss(view: Tensor, positive: Tensor, alpha: float, others: Tensor) -> Tensor:
    """FedSC's loss of one client: -2 tr(R⁺) + α tr(R²) + 2 (1-α) tr(R R̄₋ᵢ).

    This is twice equation (4) of the paper, where α is qᵢ, the client's share of all samples. With α = qᵢ the gradients
    add up to the gradient of the global loss, equation (3); extractor.py explains which α is used.

    view, positive: projections of two views of the same samples (B, d)
    others: R̄₋ᵢ, the mean correlation matrix of the other clients (d, d)
    """
    agreement = (view * positive).sum(1).mean()  # tr(R⁺)
    r = (correlation(view) + correlation(positive)) / 2  # (d, d)
    return -2 * agreement + alpha * r.square().sum() + 2 * (1 - alpha) * (r * others).sum()


def means_of_others(matrices: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """R̄₋ᵢ for every client i: Σⱼ wⱼ Rⱼ / Σⱼ wⱼ over all j ≠ i. A single client gets zeros."""
    if len(matrices) == 1:
        return [torch.zeros_like(matrices[0])]
    total_weight = sum(weights)
    total = sum(w * r for w, r in zip(weights, matrices, strict=True))
    return [(total - w * r) / (total_weight - w) for w, r in zip(weights, matrices, strict=True)]


def true_class_log_p(outputs: Tensor, y: Tensor) -> Tensor:
    """Every expert's log-probability of the true class. outputs: (n, N, K), y: (n,) -> (n, N)"""
    return outputs.log_softmax(2)[torch.arange(len(y)), :, y]


def mixture_loss(log_g: Tensor, answers: Tensor, y: Tensor, kind: str) -> Tensor:
    """The loss of the mixture, one for each row. log_g: log of the gate's weights (…, N), y: (…) -> (…)

    kind "outputs":        -log softmax(Σⱼ gⱼ Hⱼ(h))(y), the paper's equation (1). answers: Hⱼ(h), every class (…, N, K)
    kind "probabilities":  -log Σⱼ gⱼ pⱼ(y), pⱼ = softmax(Hⱼ(h)). answers: each expert's log pⱼ(y) (…, N)
    kind "expected":       -Σⱼ gⱼ log pⱼ(y), the mean loss of an expert drawn from g. answers: as above
    """
    if kind == "expected":
        # A weight of 0 is exp(-inf), and its expert counts for nothing, however bad it is.
        return -(log_g.exp() * answers).sum(-1)
    if kind == "probabilities":
        return -(log_g + answers).logsumexp(-1)
    mixed = (log_g.exp()[..., None] * answers).sum(-2)  # (…, K)
    return cross_entropy(mixed.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


def load_loss(g: Tensor, present: Tensor) -> Tensor:
    """The load balance loss of the Switch Transformer, L_load = N · Σⱼ fⱼ Pⱼ: 1 if balanced, N if one expert gets all.

    N is the number of experts, fⱼ the share of rows for which gⱼ is the largest, and Pⱼ the mean of gⱼ. The paper's
    text calls N the number of samples and writes sums for fⱼ and Pⱼ; this is the definition of the work that it cites.

    g: the gate's weights (…, B, N); present: 1 for a row, 0 for padding (…, B) -> (…)
    """
    experts = g.shape[-1]
    row_weights = (present / present.sum(-1, keepdim=True))[..., None]  # (…, B, 1)
    best = one_hot(g.argmax(-1), experts).to(g)  # (…, B, N)
    f = (best * row_weights).sum(-2)  # (…, N)
    mean_g = (g * row_weights).sum(-2)  # (…, N)
    return experts * (f * mean_g).sum(-1)
