"""One federated round: choose clients, collect their updates, average them (FedAvg), report.

A stage computes the updates; this module knows no stage, no network and no machine. A client's update is a pure
function of the state it receives, its own data and its own seeded generator. That is why the result does not depend on
the order in which clients run, nor on where they run.
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
"""A network's weights by name, as `state_dict()` returns them."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a client sends to the server at the end of a round."""

    client: int
    state: State
    samples: int
    """nᵢ, the client's weight in the average"""
    loss: float
    """Mean over the batches of this round"""
    accuracy: float | None = None
    """Share of training samples classified correctly while training; None for a stage without labels"""


@dataclass(frozen=True, slots=True)
class Round:
    """The record of one finished round (stage 2: of one epoch).

    The `progress` callbacks of training receive it, and metrics.json keeps it as an entry of `history`.
    """

    stage: str
    """Name of the stage, for example "extractor"; a baseline uses a name of its own"""
    round: int
    """Number of this round, counted from 1"""
    rounds: int
    """Number of rounds in the stage"""
    loss: float | None
    """Mean training loss, weighted by client size; None if every client dropped out"""
    accuracy: float | None = None
    """Mean training accuracy, weighted by client size; None for a stage without labels"""
    lost: tuple[int, ...] = ()
    """Clients that were selected for the round and dropped out"""
    up: int = 0
    """Bytes sent by all clients together"""
    down: int = 0
    """Bytes sent to all clients together"""
    epsilon: float | None = None
    """Privacy budget ε spent by this round and all earlier ones; None without noise on the matrices"""


def generator(seed: int, *key: object) -> torch.Generator:
    """A random generator that depends on nothing but the seed and `key`, for example ("gate", round, client)."""
    text = repr((seed, *key)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def scheduled_clients(clients: int, share: float, seed: int, *key: object) -> list[int]:
    """Client scheduling: round(share · clients) clients at random, at least one, in ascending order."""
    count = max(1, round(share * clients))
    chosen: list[int] = torch.randperm(clients, generator=generator(seed, *key, "participants"))[:count].tolist()
    return sorted(chosen)


def active_clients(
    clients: int, share: float, drop: float, seed: int, *key: object
) -> tuple[list[int], tuple[int, ...]]:
    """The scheduled clients that finish the round, and those that drop out, each with probability `drop`."""
    scheduled = scheduled_clients(clients, share, seed, *key)
    draws = torch.rand(clients, generator=generator(seed, *key, "drop"))
    active = [i for i in scheduled if draws[i] >= drop]
    dropped = tuple(i for i in scheduled if draws[i] < drop)
    return active, dropped


def average(updates: Sequence[Update]) -> dict[str, Tensor]:
    """FedAvg: Σ nᵢ θᵢ / Σ nᵢ.

    The sum runs in the order of client numbers, so that its last bits do not depend on who answered first. Integer
    tensors, such as BatchNorm's counters, are copied from the lowest-numbered client.
    """
    first, *others = sorted(updates, key=lambda update: update.client)
    total = sum(update.samples for update in updates)
    shared = dict(first.state)
    for key, value in first.state.items():
        if value.is_floating_point():
            weighted = value * (first.samples / total)
            shared[key] = sum((u.state[key] * (u.samples / total) for u in others), weighted)
    return shared


def stack_states(states: Sequence[State]) -> dict[str, Tensor]:
    """The states of several clients as one, each weight (clients, …), in the order of their names."""
    return {key: torch.stack([state[key] for state in states]) for key in sorted(states[0])}


def require_finite(stage: str, round_: int, updates: Sequence[Update]) -> None:
    """Raise DivergedError, naming the client, if a loss or a weight is NaN or infinite."""
    for update in updates:
        finite = all(value.isfinite().all() for value in update.state.values() if value.is_floating_point())
        if finite and math.isfinite(update.loss):
            continue
        problem = f"the loss is {update.loss}" if finite else "a weight is NaN or infinite"
        raise DivergedError(
            f"{stage}, round {round_ + 1}, client {update.client}: {problem}. Lower {stage}.rate and train again;"
            " checkpoints saved before this round are intact"
        )


def report(
    stage: str,
    round_: int,
    rounds: int,
    updates: Sequence[Update],
    lost: tuple[int, ...] = (),
    payload_bytes: int = 0,
    epsilon: float | None = None,
) -> Round:
    """The record of a round: means weighted by client size, and bytes in both directions.

    payload_bytes: bytes sent to each scheduled client; each client that finishes sends the same number back
    """

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(value, u.samples) for value, u in zip(values, updates, strict=True) if value is not None]
        if not known:
            return None
        return sum(value * n for value, n in known) / sum(n for _, n in known)

    return Round(
        stage,
        round_ + 1,
        rounds,
        loss=mean([u.loss for u in updates]),
        accuracy=mean([u.accuracy for u in updates]),
        lost=lost,
        up=payload_bytes * len(updates),
        down=payload_bytes * (len(updates) + len(lost)),
        epsilon=epsilon,
    )


def size_bytes(state: State) -> int:
    """Bytes of a state when it is sent."""
    return sum(value.numel() * value.element_size() for value in state.values())


def cosine(round_: int, rounds: int, warm_rounds: int = 0) -> float:
    """Factor of the learning rate: rises linearly during the warm-up rounds, then falls along half a cosine."""
    if round_ < warm_rounds:
        return (round_ + 1) / (warm_rounds + 1)
    return 0.5 * (1 + math.cos(math.pi * (round_ - warm_rounds) / max(1, rounds - warm_rounds)))
