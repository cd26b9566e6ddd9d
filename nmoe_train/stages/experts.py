"""Stage 2: a personal expert for every client, on the frozen extractor's latents.

    plain:     min over θᵢ of  CE(Hᵢ(h), y)
    adjusted:  min over θᵢ of  CE(Hᵢ(h) + log πᵢ, y)        πᵢ: the client's own class mix

The adjusted loss takes the client's habit out of its expert: what is left in Hᵢ is how likely the latent is under each
class, which is what another device wants to know. All clients are trained at once, with stacked weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExpertsConfig
from nmoe_train.stages.federation import Round, State, Update, check, generator, report

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
    progress: Callable[[Round], None] = lambda _: None,
) -> tuple[list[State], Round]:
    """Every client's expert, and the last epoch. data: each client's latents (n, d) and labels (n,)

    progress: told of every epoch but the last
    """
    clients = len(data)
    theta = {key: torch.stack([start[key] for start in starts]).requires_grad_() for key in starts[0]}
    log_prior = torch.stack([class_prior(y, classes).log() for _, y in data])  # (clients, K)
    if config.loss == "plain":
        log_prior = torch.zeros_like(log_prior)
    optimiser = torch.optim.AdamW(theta.values(), config.rate, weight_decay=config.weight_decay)
    forward = vmap(lambda state, h: functional_call(net, state, (h,)))
    steps = max(-(-len(y) // config.batch) for _, y in data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * steps)
    for epoch in range(config.epochs):
        rows = [
            _order(len(y), steps * config.batch, generator(seed, "experts", epoch, i)) for i, (_, y) in enumerate(data)
        ]
        h = torch.stack([h[order] for (h, _), order in zip(data, rows, strict=True)])  # (clients, steps·B, d)
        y = torch.stack([y[order] for (_, y), order in zip(data, rows, strict=True)])  # (clients, steps·B)
        losses, hits = torch.zeros(clients), torch.zeros(clients)
        for step in range(steps):
            batch = slice(step * config.batch, (step + 1) * config.batch)
            logits = forward(theta, h[:, batch]) + log_prior[:, None]  # (clients, B, K)
            loss = cross_entropy(logits.flatten(0, 1), y[:, batch].flatten(), reduction="none").view(clients, -1)
            optimiser.zero_grad()
            loss.mean(1).sum().backward()  # summed over clients: each one's gradient is that of its own mean loss
            optimiser.step()
            schedule.step()
            losses += loss.detach().mean(1) / steps
            hits += (logits.detach().argmax(2) == y[:, batch]).float().mean(1) / steps
        states = [{key: value[i].detach() for key, value in theta.items()} for i in range(clients)]
        updates = [
            Update(i, state, len(data[i][1]), losses[i].item(), hits[i].item()) for i, state in enumerate(states)
        ]
        check("experts", epoch, updates)
        told = report("experts", epoch, config.epochs, updates)
        if epoch + 1 < config.epochs:
            progress(told)
    return [{key: value.clone() for key, value in state.items()} for state in states], told


def _order(samples: int, due: int, g: torch.Generator) -> Tensor:
    """`due` indices: whole permutations one after another, so that clients of unequal size take equal steps."""
    return torch.cat([torch.randperm(samples, generator=g) for _ in range(-(-due // samples))])[:due]
