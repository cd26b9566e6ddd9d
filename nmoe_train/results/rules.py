"""Chooses the rules of a run on held-out rows: calibration, class mix, and the local exit.

Every choice compares accuracies on each client's own held-out rows and on all of them together:

1. Calibration (stages/calibration.py) is tried in each form, and none at all; each row is calibrated by a fit on other
   rows. The form in which the fleet answers best is used; of forms that are almost as good, the one with the best
   probabilities.
2. The class mix is used if neither accuracy falls for any method: the fleet, each expert alone, stage 1's classifier.
3. The local exit gets the confidence and the distance with the best accuracy of the fleet. Of pairs that are almost as
   good, it gets the one that keeps most own rows, and fewest rows of classes that the client has no sample of. There is
   no exit if either accuracy would fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.protocol.answering import AnswerRules, answer
from nmoe_edge.protocol.classmix import cross_adapted
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.thresholds import THRESHOLDS, TOLERANCE
from nmoe_train.config import InferenceConfig
from nmoe_train.run import Inference
from nmoe_train.stages.calibration import (
    EVERY_ROW,
    MIN_ROWS,
    Calibration,
    cross_fitted,
    fit,
    log_likelihood,
    no_calibration,
    row_weights,
)

ALMOST = 0.002
"""Two accuracies that differ by less are equally good."""
FAMILIAR_SHARES = (0.8, 0.9, 0.95, 0.98, 1.0)
"""Largest distances that are tried: those that include these shares of the clients' own rows."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The held-out rows of all clients, and what the networks compute for them."""

    y: NDArray[np.int64]
    """(n,)"""
    clients: NDArray[np.int64]
    """(n,): the client that a row belongs to"""
    scores: NDArray[np.float32]
    """(N, n, N): every device's gate"""
    outputs: NDArray[np.float32]
    """(n, N, K): every expert"""
    distances: NDArray[np.float64]
    """(N, n): from what each client knows"""
    seen: NDArray[np.bool_]
    """(N, K): whether a client has training samples of a class"""
    head: NDArray[np.float32] | None = None
    """(n, K): the classifier of stage 1, when clients share one"""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The rules, and the calibration that they were chosen with."""

    inference: Inference
    calibration: Calibration
    head: Calibration | None
    """Of stage 1's classifier, N = 1; None without one."""
    steps: int = 0
    """Newton's steps for all calibrations that were tried, each for one expert."""
    note: str | None = None
    """Why nothing was calibrated, if it should have been."""


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    calibration: Calibration
    outputs: NDArray[np.float32]
    """(n, N, K) of held-out rows, each calibrated without itself"""
    prior: bool
    """Whether these outputs carry the client's class mix, so that it must not be multiplied in again"""


Pair = tuple[float, float]
"""Mean accuracy over devices, on their own rows and on all rows."""


def choose_rules(held: HeldOut, rules: Inference, settings: InferenceConfig, prior: bool, seed: int) -> Chosen:
    """The rules for a run, from its held-out rows.

    rules: top-k and combination
    prior: whether the experts carry their client's class mix
    """
    candidates = [_Candidate(no_calibration(*held.outputs.shape[1:]), held.outputs, prior)]
    head = None if held.head is None else held.head[:, None]
    head_calibration = None if head is None else no_calibration(1, head.shape[2])
    note = None
    steps = 0
    if settings.calibrate and len(held.y) < MIN_ROWS:
        note = (
            f"Nothing is calibrated: that takes {MIN_ROWS} held-out rows, and there are {len(held.y)};"
            " raise data.held_out or data.train_size"
        )
    elif settings.calibrate:
        found, steps = _calibrated(held, rules.answer_rules(), seed)
        candidates += found
        head, head_calibration = _calibrated_head(head, held.y, seed)
    tried = [_adapted(held, candidate, head, rules, settings.adapt) for candidate in candidates]
    best = max(sum(accuracies) for _, accuracies in tried)
    good = [i for i, (_, accuracies) in enumerate(tried) if sum(accuracies) >= best - 2 * ALMOST]
    chosen = max(good, key=lambda i: log_likelihood(candidates[i].outputs, held.y))
    inference, accuracies = tried[chosen]
    if settings.local_first:
        inference = _with_exit(held, candidates[chosen].outputs, inference, accuracies, settings.novelty)
    return Chosen(inference, candidates[chosen].calibration, head_calibration, steps, note)


def _calibrated(held: HeldOut, rules: AnswerRules, seed: int) -> tuple[list[_Candidate], int]:
    """Each form of calibration, and Newton's steps for all of them."""
    shares = np.mean([answer(held.scores[i], held.outputs, i, rules).routed for i in range(len(held.scores))], axis=0)
    found = []
    all_steps = 0
    for every_row in EVERY_ROW:
        weights = row_weights(shares, every_row)  # (n, N)
        calibration, steps = fit(held.outputs, held.y, weights)
        outputs, more_steps = cross_fitted(held.outputs, held.y, weights, seed)
        found.append(_Candidate(calibration, outputs, False))
        all_steps += steps + more_steps
    return found, all_steps


def _calibrated_head(
    head: NDArray[np.float32] | None, y: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float32] | None, Calibration | None]:
    """Stage 1's outputs (n, 1, K), each calibrated without itself, and its calibration: none where that is better."""
    if head is None:
        return None, None
    weights = np.ones((len(y), 1))
    calibrated, _ = cross_fitted(head, y, weights, seed)
    if log_likelihood(calibrated, y) <= log_likelihood(head, y):
        return head, no_calibration(1, head.shape[2])
    return calibrated, fit(head, y, weights)[0]


def _adapted(
    held: HeldOut, candidate: _Candidate, head: NDArray[np.float32] | None, rules: Inference, wanted: bool
) -> tuple[Inference, Pair]:
    """The rules with the class mix if it may be used, and the fleet's accuracy under them."""
    devices = range(len(held.scores))
    plain = rules.answer_rules()
    networked = [answer(held.scores[i], candidate.outputs, i, plain).p for i in devices]
    without = _accuracy(held, networked, False)
    if candidate.prior or not wanted:
        return rules, without
    methods = [networked, [softmax(candidate.outputs[:, i]) for i in devices]]
    if head is not None:
        methods.append([softmax(head[:, 0])] * len(devices))
    pairs = [(_accuracy(held, p, False), _accuracy(held, p, True)) for p in methods]
    if any(_falls(before, after) for before, after in pairs):
        return rules, without
    return replace(rules, adapt=True), pairs[0][1]


def _accuracy(held: HeldOut, p: Sequence[NDArray[np.floating]], adapt: bool) -> Pair:
    """p: each device's probabilities (n, K) for all rows"""
    right = _right(held, p, adapt)
    return float(np.mean([own.mean() for own, _ in right])), float(np.mean([pooled.mean() for _, pooled in right]))


def _right(
    held: HeldOut, p: Sequence[NDArray[np.floating]], adapt: bool
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each device, whether its own rows and all rows are answered right. p: each device's (n, K)"""
    found = []
    for device, every in enumerate(p):
        own = held.clients == device
        answers = [cross_adapted(rows, 0) if adapt else rows for rows in (every[own], every)]
        found.append((answers[0].argmax(axis=1) == held.y[own], answers[1].argmax(axis=1) == held.y))
    return found


def _falls(before: Pair, after: Pair) -> bool:
    return any(b - a > TOLERANCE for b, a in zip(before, after, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Exit:
    """One device's rows, for choosing the exit. Fields come for own rows and for all rows."""

    confidence: NDArray[np.float64]
    distance: NDArray[np.float64]
    alone_right: NDArray[np.bool_]
    gate_right: NDArray[np.bool_]
    unseen: NDArray[np.bool_]

    def kept(self, local_first: float, familiar: float | None) -> NDArray[np.bool_]:
        kept = self.confidence > local_first
        return kept if familiar is None else kept & (self.distance <= familiar)


def _with_exit(
    held: HeldOut, outputs: NDArray[np.float32], rules: Inference, without: Pair, novelty: bool
) -> Inference:
    """The rules with the best exit, or as they are when every exit lowers an accuracy. outputs: calibrated (n, N, K)"""
    devices = range(len(held.scores))
    own_distances = held.distances[held.clients, np.arange(len(held.y))]
    limits = [float(np.quantile(own_distances, share)) for share in FAMILIAR_SHARES] if novelty else [None]
    pairs = list(product(THRESHOLDS, limits))
    own, pooled = _exits(held, outputs, rules)
    accuracies = [(_exit_accuracy(own, *pair), _exit_accuracy(pooled, *pair)) for pair in pairs]
    allowed = [i for i, after in enumerate(accuracies) if not _falls(without, after)]
    if not allowed:
        return rules
    best = max(sum(accuracies[i]) for i in allowed)
    good = [i for i in allowed if sum(accuracies[i]) >= best - 2 * ALMOST]
    local_first, familiar = pairs[max(good, key=lambda i: _selectivity(own, pooled, *pairs[i]))]
    chosen = replace(rules, local_first=local_first, familiar=familiar)
    p = [answer(held.scores[i], outputs, i, chosen.answer_rules(), held.distances[i]).p for i in devices]
    return rules if _falls(without, _accuracy(held, p, rules.adapt)) else chosen


def _exits(held: HeldOut, outputs: NDArray[np.float32], rules: Inference) -> tuple[list[_Exit], list[_Exit]]:
    """Each device's own rows, and all rows as it sees them."""
    devices = range(len(held.scores))
    alone = [softmax(outputs[:, i]) for i in devices]
    gate = [answer(held.scores[i], outputs, i, rules.answer_rules()).p for i in devices]
    alone_right = _right(held, alone, rules.adapt)
    gate_right = _right(held, gate, rules.adapt)
    own, pooled = [], []
    for i in devices:
        unseen = ~held.seen[i][held.y]
        confidence = alone[i].max(axis=1)
        mine = held.clients == i
        distance = held.distances[i]
        own.append(_Exit(confidence[mine], distance[mine], alone_right[i][0], gate_right[i][0], unseen[mine]))
        pooled.append(_Exit(confidence, distance, alone_right[i][1], gate_right[i][1], unseen))
    return own, pooled


def _exit_accuracy(parts: Sequence[_Exit], local_first: float, familiar: float | None) -> float:
    """Mean accuracy when kept rows are answered by the own expert, and others by the gate's choice."""
    shares = [np.where(p.kept(local_first, familiar), p.alone_right, p.gate_right).mean() for p in parts]
    return float(np.mean(shares))


def _selectivity(own: Sequence[_Exit], pooled: Sequence[_Exit], local_first: float, familiar: float | None) -> float:
    """The share of own rows that is kept, less the share of rows of unseen classes that is."""
    kept_own = np.concatenate([p.kept(local_first, familiar) for p in own])
    kept_unseen = np.concatenate([p.kept(local_first, familiar)[p.unseen] for p in pooled])
    return float(kept_own.mean()) - (float(kept_unseen.mean()) if len(kept_unseen) else 0.0)
