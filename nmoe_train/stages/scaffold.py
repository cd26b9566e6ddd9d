"""SCAFFOLD (Karimireddy et al. 2020) for FedCE: clients with different data drift apart less.

Between two synchronisations a client's steps lead to the optimum of its own samples. So each client keeps a control
variate cᵢ, its mean gradient in the last round that it took part in, and corrects every gradient by c - cᵢ, where
c = Σᵢ qᵢ cᵢ is the mean over all clients:

    step      g + c - cᵢ
    after     cᵢ  <-  cᵢ - c + (x - yᵢ) / ℓ          x, yᵢ: the weights before and after the client's steps

ℓ is the sum of the client's steps. With momentum a gradient acts on later steps too, and ℓ counts that. Taking cᵢ from
one gradient at x instead (option I of the paper) was far worse, see LOG.md. c is sent with the weights, and the change
of cᵢ comes back with them: twice the bytes of FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nmoe_train.config import ExtractorConfig
from nmoe_train.stages.extractor import AdjustGradients, Data, fedce_update, steps_of_round
from nmoe_train.stages.federation import (
    Round,
    State,
    active_clients,
    average,
    cosine,
    generator,
    report,
    require_finite,
    size_bytes,
)


def zero_variates(net: nn.Module, clients: int) -> list[State]:
    """Every client's cᵢ before the first round, by the names of the trained parameters."""
    return [{key: torch.zeros_like(p) for key, p in net.named_parameters() if p.requires_grad}] * clients


def scaffold_round(
    net: nn.Module,
    states: Sequence[State],
    variates: Sequence[State],
    data: Data,
    round_: int,
    seed: int,
    config: ExtractorConfig,
) -> tuple[list[State], list[State], Round]:
    """One round: every client's classifier and cᵢ before -> after."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    active, dropped = active_clients(len(data), config.share, config.drop, seed, "extractor", round_)
    mean = _mean(variates, [len(y) for _, y in data])
    updates = []
    after = list(variates)
    for i in active:
        correction = {key: mean[key] - own for key, own in variates[i].items()}
        g = generator(seed, "extractor", round_, i)
        update = fedce_update(net, states[i], i, *data[i], rate, config, g, _adding(net, correction))
        length = rate * _length(steps_of_round(len(data[i][1]), config), config.momentum)
        if length:
            moved = {key: (states[i][key] - update.state[key]) / length for key in correction}
            after[i] = {key: moved[key] - correction[key] for key in correction}
        updates.append(update)
    require_finite("extractor", round_, updates)
    summary = report("extractor", round_, config.rounds, updates, dropped, size_bytes(states[0]) + size_bytes(mean))
    if not updates:
        return list(states), after, summary
    return [average(updates)] * len(data), after, summary


def _mean(variates: Sequence[State], sizes: Sequence[int]) -> dict[str, Tensor]:
    """c = Σᵢ qᵢ cᵢ"""
    total = sum(sizes)
    weighted = list(zip(variates, sizes, strict=True))
    return {key: torch.stack([n / total * own[key] for own, n in weighted]).sum(0) for key in variates[0]}


def _adding(net: nn.Module, correction: State) -> AdjustGradients:
    """Adds the correction to the gradients."""
    changes = [correction[key] for key, p in net.named_parameters() if p.requires_grad]

    def adjust(trained: Sequence[Tensor]) -> None:
        for weight, change in zip(trained, changes, strict=True):
            if weight.grad is not None:
                weight.grad.add_(change)

    return adjust


def _length(steps: int, momentum: float) -> float:
    """How far a constant gradient of 1 moves a weight in so many steps at rate 1."""
    velocity = 0.0
    length = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1
        length += velocity
    return length
