"""What every federated round is made of. Knows no stage, no network and no machine.

A client's update is a function of (state, its data, a generator); a server's step is a function of the updates. One
seeded generator for each (stage, round, client) makes the result the same in whatever order, and wherever, they run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_train.errors import DivergedError

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a client sends back."""

    client: int
    state: State
    samples: int
    loss: float
    """Mean over what it trained on."""


def generator(seed: int, *key: object) -> torch.Generator:
    """The source of randomness of one stage, round and client."""
    text = repr((seed, *key)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def participants(clients: int, share: float, seed: int, *key: object) -> list[int]:
    """Who trains in this round: round(share · clients) of them, at least one, in the order of their numbers."""
    count = max(1, round(share * clients))
    chosen: list[int] = torch.randperm(clients, generator=generator(seed, *key, "participants"))[:count].tolist()
    return sorted(chosen)


def average(updates: Sequence[Update]) -> dict[str, Tensor]:
    """FedAvg: Σ nᵢ θᵢ / Σ nᵢ, summed in the order of the clients' numbers; of counters, the first client's."""
    updates = sorted(updates, key=lambda update: update.client)
    total = sum(update.samples for update in updates)
    shared = dict(updates[0].state)
    for key, first in shared.items():
        if first.is_floating_point():
            shared[key] = sum(
                (u.state[key] * (u.samples / total) for u in updates[1:]), first * (updates[0].samples / total)
            )
    return shared


def check_losses(stage: str, round_: int, updates: Sequence[Update]) -> float:
    """The round's mean loss; DivergedError names the client whose loss is no number."""
    for update in updates:
        if not math.isfinite(update.loss):
            raise DivergedError(
                f"{stage}, round {round_ + 1}: the loss of client {update.client} is {update.loss};"
                " the state before this round is kept; try a lower rate"
            )
    return sum(update.loss * update.samples for update in updates) / sum(update.samples for update in updates)


def cosine(round_: int, rounds: int, warm_rounds: int = 0) -> float:
    """What the rate is multiplied with: it rises through the warm rounds, then falls like a half cosine."""
    if round_ < warm_rounds:
        return (round_ + 1) / (warm_rounds + 1)
    return 0.5 * (1 + math.cos(math.pi * (round_ - warm_rounds) / max(1, rounds - warm_rounds)))
