"""Stage 2: one personal expert Hᵢ per client, trained on the frozen extractor's latents h = F(x).

    loss "plain":     min over Hᵢ   CE(Hᵢ(h), y)                the paper's equation (5)
    loss "adjusted":  min over Hᵢ   CE(Hᵢ(h) + log πᵢ, y)       πᵢ: the client's own class mix (logit adjustment)

The plain loss is the paper's. The adjusted loss, our default, removes the client's class mix from its expert: Hᵢ then
says how well a latent fits each class, which holds for another device's rows too. A device multiplies its own class mix
back in when it answers (inference.adapt).

As in the paper, experts start from FedCE's head (experts.start = "head") or from fresh weights. Nothing is sent between
clients: each sees its own data only. All clients are trained at once with stacked weights, which is faster and gives
each client the numbers it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExpertsConfig
from nmoe_train.stages.federation import Round, State, Update, generator, report, require_finite, stack_states
from nmoe_train.stages.losses import class_prior


def train_experts(
    net: nn.Module,
    starts: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    seed: int,
    config: ExpertsConfig,
    progress: Callable[[Round], None] = lambda _: None,
) -> tuple[list[State], Round]:
    """Train every client's expert; returns their weights and the record of the last epoch.

    net: an expert's network, used for its structure only
    starts: each client's initial weights
    data: each client's latents (n, d) and labels (n,)
    progress: called after every epoch but the last

    Without epochs the initial weights are the experts, and the record has no loss.
    """
    if not config.epochs:
        return [dict(start) for start in starts], Round("experts", 1, 1, loss=None)
    clients = len(data)
    theta = {key: value.requires_grad_() for key, value in stack_states(starts).items()}
    log_prior = torch.stack([class_prior(y, classes).log() for _, y in data])  # (clients, K)
    if config.loss == "plain":
        log_prior = torch.zeros_like(log_prior)
    optimiser = torch.optim.AdamW(theta.values(), config.rate, weight_decay=config.weight_decay)
    forward = vmap(lambda state, h: functional_call(net, state, (h,)))
    steps = max(-(-len(y) // config.batch) for _, y in data)  # every client takes as many as the largest one needs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * steps)
    for epoch in range(config.epochs):
        h, y = _epoch_rows(data, steps * config.batch, seed, epoch)
        losses = torch.zeros(clients)
        accuracies = torch.zeros(clients)
        for step in range(steps):
            batch = slice(step * config.batch, (step + 1) * config.batch)
            logits = forward(theta, h[:, batch]) + log_prior[:, None]  # (clients, B, K)
            loss = cross_entropy(logits.flatten(0, 1), y[:, batch].flatten(), reduction="none").view(clients, -1)
            optimiser.zero_grad()
            loss.mean(1).sum().backward()  # summed over clients, so each gets the gradient of its own mean loss
            optimiser.step()
            schedule.step()
            losses += loss.detach().mean(1) / steps
            accuracies += (logits.detach().argmax(2) == y[:, batch]).float().mean(1) / steps
        updates = []
        for i in range(clients):
            state = {key: value[i].detach() for key, value in theta.items()}
            updates.append(Update(i, state, len(data[i][1]), losses[i].item(), accuracies[i].item()))
        require_finite("experts", epoch, updates)
        summary = report("experts", epoch, config.epochs, updates)
        if epoch + 1 < config.epochs:
            progress(summary)
    trained = [{key: value.clone() for key, value in update.state.items()} for update in updates]
    return trained, summary


def _epoch_rows(data: Sequence[tuple[Tensor, Tensor]], rows: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Every client's rows of one epoch, shuffled and stacked: latents (clients, rows, d), labels (clients, rows)."""
    latents, labels = [], []
    for i, (h, y) in enumerate(data):
        order = _repeated_order(len(y), rows, generator(seed, "experts", epoch, i))
        latents.append(h[order])
        labels.append(y[order])
    return torch.stack(latents), torch.stack(labels)


def _repeated_order(samples: int, count: int, g: torch.Generator) -> Tensor:
    """`count` indices: shuffled passes, one after another, so that clients of unequal size take equally many steps."""
    passes = -(-count // samples)
    return torch.cat([torch.randperm(samples, generator=g) for _ in range(passes)])[:count]
