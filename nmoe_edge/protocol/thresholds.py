"""Chooses the confidence above which a device answers alone, on held-out rows and under the rules of answering.

A device is given the threshold in its bundle. Training chooses it, and export again for graphs of another precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.protocol.answering import AnswerRules, answer_adapted

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences that are tried, from most to fewest rows answered locally."""
TOLERANCE = 0.003
"""An accuracy that falls by less has not fallen: it is the noise of a few hundred rows."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRows:
    """Rows as one device sees them, with what every expert answers and the true classes."""

    own: int
    """The number of the device's own expert."""
    scores: NDArray[Any]
    """(n, N), of the device's gate"""
    outputs: NDArray[Any]
    """(n, N, K), of every expert"""
    labels: NDArray[np.int64]
    """(n,)"""
    distances: NDArray[Any] | None = None
    """(n,), of the latents from what the own expert knows"""


def accuracy(rows: LabelledRows, rules: AnswerRules, seed: int = 0) -> float:
    """The share of these rows that the device answers right."""
    answered = answer_adapted(rows.scores, rows.outputs, rows.own, rules, rows.distances, seed)
    return float((answered.p.argmax(axis=1) == rows.labels).mean())


def choose_local_first(
    own: Sequence[LabelledRows], pooled: Sequence[LabelledRows], rules: AnswerRules, seed: int = 0
) -> float | None:
    """The confidence above which a row is answered locally; None: the gate decides alone.

    Of THRESHOLDS and None, it is the one with the best accuracy, the mean over devices on their own rows and on the
    pooled ones. One that lowers either accuracy is not taken. Among equals, it is the one that answers most rows
    locally.

    own: each device's held-out rows
    pooled: for each device, the held-out rows of all devices
    """

    def accuracies(threshold: float | None) -> tuple[float, float]:
        tried = replace(rules, local_first=threshold)
        on_own = np.mean([accuracy(rows, tried, seed) for rows in own])
        on_pooled = np.mean([accuracy(rows, tried, seed) for rows in pooled])
        return float(on_own), float(on_pooled)

    without = accuracies(None)
    best: float | None = None
    best_sum = sum(without)
    for threshold in reversed(THRESHOLDS):
        on_own, on_pooled = accuracies(threshold)
        falls = without[0] - on_own > TOLERANCE or without[1] - on_pooled > TOLERANCE
        if not falls and on_own + on_pooled >= best_sum:
            best, best_sum = threshold, on_own + on_pooled
    return best
