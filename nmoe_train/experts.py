"""Stage 2: a personal expert for every client, on the frozen extractor's latents.

    plain:     min over θᵢ of  CE(Hᵢ(h), y)
    adjusted:  min over θᵢ of  CE(Hᵢ(h) + log πᵢ, y)        πᵢ: the client's own class mix

The adjusted loss takes the client's habit out of its expert: what is left in Hᵢ is how likely the latent is under each
class, which is what another device wants to know. All clients are trained at once, with stacked weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExpertsConfig
from nmoe_train.errors import DivergedError
from nmoe_train.federation import State, generator

SMOOTHING = 0.5
"""Added to every class count: a class that a client never saw has a small prior, not none."""


def class_prior(y: Tensor, classes: int) -> Tensor:
    """π: the smoothed class mix of these labels. (n,) -> (K,)"""
    counts = torch.bincount(y, minlength=classes) + SMOOTHING
    return counts / counts.sum()


def train_experts(
    net: nn.Module,
    starts: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    seed: int,
    config: ExpertsConfig,
) -> tuple[list[State], float]:
    """Every client's expert, and the last epoch's mean loss. data: each client's latents (n, d) and labels (n,)"""
    clients = len(data)
    theta = {key: torch.stack([start[key] for start in starts]).requires_grad_() for key in starts[0]}
    log_prior = torch.stack([class_prior(y, classes).log() for _, y in data])  # (clients, K)
    if config.loss == "plain":
        log_prior = torch.zeros_like(log_prior)
    optimiser = torch.optim.AdamW(theta.values(), config.rate, weight_decay=config.weight_decay)
    forward = vmap(lambda state, h: functional_call(net, state, (h,)))
    steps = max(-(-len(y) // config.batch) for _, y in data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * steps)
    loss = torch.zeros(())
    for epoch in range(config.epochs):
        rows = torch.stack(
            [
                _order(len(y), steps * config.batch, generator(seed, "experts", epoch, i))
                for i, (_, y) in enumerate(data)
            ]
        )
        h = torch.stack([h[order] for (h, _), order in zip(data, rows, strict=True)])  # (clients, steps·B, d)
        y = torch.stack([y[order] for (_, y), order in zip(data, rows, strict=True)])  # (clients, steps·B)
        for step in range(steps):
            batch = slice(step * config.batch, (step + 1) * config.batch)
            logits = forward(theta, h[:, batch]) + log_prior[:, None]  # (clients, B, K)
            # Summed over clients: each one's gradient is that of its own mean loss.
            loss = cross_entropy(logits.flatten(0, 1), y[:, batch].flatten()) * clients
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    if not loss.isfinite():
        raise DivergedError("experts: the loss is no number; try a lower rate")
    return [
        {key: value[i].detach().clone() for key, value in theta.items()} for i in range(clients)
    ], loss.item() / clients


def _order(samples: int, due: int, g: torch.Generator) -> Tensor:
    """`due` indices: whole permutations one after another, so that clients of unequal size take equal steps."""
    return torch.cat([torch.randperm(samples, generator=g) for _ in range(-(-due // samples))])[:due]
