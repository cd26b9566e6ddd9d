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

    Of THRESHOLDS and None, it is the one with the best mean accuracy over all devices, on their own rows and on the
    pooled ones. Among equals, it is the one that answers most rows locally.

    own: each device's held-out rows
    pooled: for each device, the held-out rows of all devices
    """

    def mean_accuracy(threshold: float | None) -> float:
        tried = replace(rules, local_first=threshold)
        return float(np.mean([accuracy(rows, tried, seed) for part in (own, pooled) for rows in part]))

    candidates = (*THRESHOLDS, None)  # in the order of preference among equals
    return max(candidates, key=mean_accuracy)
