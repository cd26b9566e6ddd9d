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
    accuracy: float | None = None
    """Likewise, on its own samples while it trained; None where there are no labels."""


@dataclass(frozen=True, slots=True)
class Round:
    """What is told of a round when it is over."""

    stage: str
    round: int
    """From 1 on."""
    rounds: int
    """In all."""
    loss: float | None
    """None where everybody dropped out."""
    accuracy: float | None = None
    lost: tuple[int, ...] = ()
    """Clients that were to take part and dropped out."""
    up: int = 0
    """Bytes from all clients."""
    down: int = 0
    """Bytes to all clients."""
    epsilon: float | None = None
    """What all releases so far cost, where they are protected."""


def generator(seed: int, *key: object) -> torch.Generator:
    """The source of randomness of one stage, round and client."""
    text = repr((seed, *key)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def participants(clients: int, share: float, seed: int, *key: object) -> list[int]:
    """Who is to train in this round: round(share · clients), at least one, in the order of their numbers."""
    count = max(1, round(share * clients))
    chosen: list[int] = torch.randperm(clients, generator=generator(seed, *key, "participants"))[:count].tolist()
    return sorted(chosen)


def attending(clients: int, share: float, drop: float, seed: int, *key: object) -> tuple[list[int], tuple[int, ...]]:
    """Of the participants those who stay, and those who drop out, each with probability `drop`."""
    chosen = participants(clients, share, seed, *key)
    luck = torch.rand(clients, generator=generator(seed, *key, "drop"))
    return [i for i in chosen if luck[i] >= drop], tuple(i for i in chosen if luck[i] < drop)


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


def check(stage: str, round_: int, updates: Sequence[Update]) -> None:
    """Refuse an update with a loss or a weight that is no number: DivergedError names its client."""
    for update in updates:
        finite = all(value.isfinite().all() for value in update.state.values() if value.is_floating_point())
        if not (finite and math.isfinite(update.loss)):
            what = f"the loss is {update.loss}" if finite else "a weight is no number"
            raise DivergedError(
                f"{stage}, round {round_ + 1}, client {update.client}: {what}; what was saved before is kept;"
                f" begin anew with a lower {stage}.rate"
            )


def report(
    stage: str,
    round_: int,
    rounds: int,
    updates: Sequence[Update],
    lost: tuple[int, ...] = (),
    sent: int = 0,
    epsilon: float | None = None,
) -> Round:
    """A round's mean loss and accuracy, by client size; `sent` bytes went to each client, and came back from most."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(value, u.samples) for value, u in zip(values, updates, strict=True) if value is not None]
        return sum(value * n for value, n in known) / sum(n for _, n in known) if known else None

    loss, accuracy = mean([u.loss for u in updates]), mean([u.accuracy for u in updates])
    up, down = sent * len(updates), sent * (len(updates) + len(lost))
    return Round(stage, round_ + 1, rounds, loss, accuracy, lost, up, down, epsilon)


def size(state: State) -> int:
    """Bytes of a state on its way."""
    return sum(value.numel() * value.element_size() for value in state.values())


def cosine(round_: int, rounds: int, warm_rounds: int = 0) -> float:
    """What the rate is multiplied with: it rises through the warm rounds, then falls like a half cosine."""
    if round_ < warm_rounds:
        return (round_ + 1) / (warm_rounds + 1)
    return 0.5 * (1 + math.cos(math.pi * (round_ - warm_rounds) / max(1, rounds - warm_rounds)))
