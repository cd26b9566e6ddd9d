"""Stage 1: the shared feature extractor, by FedCE.

    min over θ_F, θ_H of  Σᵢ nᵢ/n · CE(H(F(xᵢ)), yᵢ)

Every client trains the whole classifier H∘F on its own samples for a few epochs; the server averages it by client size
(H stays at home when heads are local). After the last round F is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExtractorConfig
from nmoe_train.federation import State, Update, average, check_losses, cosine, generator, participants


class Classifier(nn.Module):
    """H∘F."""

    def __init__(self, extractor: nn.Module, head: nn.Module) -> None:
        """F and H."""
        super().__init__()
        self.extractor, self.head = extractor, head

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)"""
        return self.head(self.extractor(x))


def client_update(
    net: nn.Module,
    state: State,
    client: int,
    x: Tensor,
    y: Tensor,
    rate: float,
    config: ExtractorConfig,
    g: torch.Generator,
) -> Update:
    """A client's local epochs of SGD from `state`. x: (n, C, H, W) uint8, y: (n,)"""
    net.train()
    theta = {key: value.clone() for key, value in state.items()}
    learned = [theta[key].requires_grad_() for key, p in net.named_parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learned, rate, momentum=config.momentum, weight_decay=config.weight_decay)
    losses, seen = 0.0, 0
    for _ in range(config.local_epochs):
        for batch in torch.randperm(len(x), generator=g).split(config.batch):
            loss = cross_entropy(functional_call(net, theta, (x[batch],)), y[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, config.clip)
            optimiser.step()
            losses, seen = losses + loss.item() * len(batch), seen + len(batch)
    return Update(client, {key: value.detach() for key, value in theta.items()}, len(x), losses / max(1, seen))


def fedce_round(
    net: nn.Module,
    states: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor]],
    round_: int,
    seed: int,
    config: ExtractorConfig,
) -> tuple[list[State], float]:
    """One round: every client's classifier before -> after, and the mean loss. data: each client's (x, y)"""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    updates = [
        client_update(net, states[i], i, *data[i], rate, config, generator(seed, "extractor", round_, i))
        for i in participants(len(data), config.share, seed, "extractor", round_)
    ]
    loss = check_losses("extractor", round_, updates)
    shared = average(updates)
    if config.heads == "shared":
        return [shared] * len(data), loss
    heads = {update.client: update.state for update in updates}
    return [
        {key: heads.get(i, states[i])[key] if key.startswith("head.") else value for key, value in shared.items()}
        for i in range(len(data))
    ], loss
