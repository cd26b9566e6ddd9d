"""How often a device sees each class, learned from its unlabelled traffic, and answers reweighted by it.

Only for answers without a class prior of their own: each answer is multiplied by the class mix and normalised. The mix
is the one that best explains the last answers, found by expectation maximisation, and is used from MIN_ROWS rows on.
Pure: device/saved_mix.py keeps the rows across restarts.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_ROWS = 100
"""Below this many rows a device does not use its mix. shrunk_mix already discounts what chance explains, so a mix that
is used early gains much on skewed rows and costs little on even ones."""
MAX_ROWS = 2000
"""Older rows are dropped, so that the mix follows a camera that is moved."""
PRIOR_ROWS = 10.0
"""Rows of an even mix that every estimate adds to those it has."""
EVIDENCE = 2.0
"""How many times the gain that chance alone explains an estimate must reach before it counts at all."""
_ROWS_PER_ESTIMATE = 20
_FIRST_STEPS = 30
"""EM steps from an even mix."""
_NEXT_STEPS = 5
"""EM steps from the last estimate."""
_MAX_VALUES = 400_000
"""Numbers kept: with a thousand classes an estimate must not hold up the device."""


class ClassMix:
    """The class mix of one device, and the answers that it was learned from."""

    def __init__(self, outputs: int) -> None:
        """outputs: number of classes"""
        self.outputs = outputs
        max_rows = max(MIN_ROWS, min(MAX_ROWS, _MAX_VALUES // outputs))
        self._rows: deque[NDArray[np.float32]] = deque(maxlen=max_rows)
        self._estimate = np.full(outputs, 1 / outputs)
        self._mix = self._estimate
        self._new_rows = 0
        self._estimates = 0

    @property
    def rows(self) -> int:
        """Number of answers kept."""
        return len(self._rows)

    @property
    def mix(self) -> NDArray[np.float64] | None:
        """(outputs,), summing to one; None below MIN_ROWS."""
        return self._mix if self.rows >= MIN_ROWS else None

    def reweight(self, p: NDArray[Any]) -> NDArray[np.float32]:
        """Reweight answers with the current mix, which then learns from them. p: (rows, outputs), without a prior"""
        mix = self.mix
        weighed = p * mix if mix is not None else p
        weighed = weighed / weighed.sum(1, keepdims=True)
        self._rows.extend(np.array(p, np.float32))
        self._new_rows += len(p)
        if self._new_rows >= _ROWS_PER_ESTIMATE and self.rows >= MIN_ROWS:
            steps = _FIRST_STEPS if self._estimates == 0 else _NEXT_STEPS
            self._learn(steps)
            self._new_rows = 0
            self._estimates += 1
        return np.asarray(weighed, np.float32)

    def saved_rows(self) -> NDArray[np.float32]:
        """The answers kept, as `restore` takes them: (rows, outputs)."""
        return np.stack(self._rows) if self._rows else np.zeros((0, self.outputs), np.float32)

    def restore(self, rows: NDArray[Any]) -> None:
        """Replace the answers kept by saved ones; ValueError, and nothing changed, where they are not probabilities."""
        saved = np.asarray(rows, np.float32)
        if saved.ndim != 2 or saved.shape[1] != self.outputs:
            raise ValueError(f"expected rows of {self.outputs} probabilities, not shape {list(saved.shape)}")
        if not np.isfinite(saved).all() or (saved < 0).any() or not (saved.sum(1) > 0).all():
            raise ValueError("the rows are not probabilities")
        self._rows.clear()
        self._rows.extend(np.array(saved))
        if self.rows >= MIN_ROWS:
            self._estimate = np.full(self.outputs, 1 / self.outputs)
            self._learn(_FIRST_STEPS)

    def _learn(self, steps: int) -> None:
        rows = np.stack(self._rows)
        self._estimate = class_mix(rows, self._estimate, steps)
        self._mix = shrunk_mix(rows, self._estimate)


def class_mix(
    p: NDArray[Any], start: NDArray[np.float64] | None = None, steps: int = _FIRST_STEPS
) -> NDArray[np.float64]:
    """The class mix that best explains these answers: p, (rows, outputs) -> (outputs,).

    It is found by expectation maximisation with PRIOR_ROWS rows of an even mix added, so that few rows hardly change an
    answer and no class is ruled out.
    """
    p = np.asarray(p, np.float64)
    outputs = p.shape[1]
    mix = np.full(outputs, 1 / outputs) if start is None else start
    for _ in range(steps):
        # The sum over rows of p · mix / (their sum over classes).
        counts = mix * ((1 / (p @ mix)) @ p) + PRIOR_ROWS / outputs
        mix = counts / counts.sum()
    return mix


def shrunk_mix(p: NDArray[Any], mix: NDArray[np.float64]) -> NDArray[np.float64]:
    """A mix estimated from p, moved towards an even one by as much as chance explains: (n, K), (K,) -> (K,).

    Where the classes are in truth even, an estimate still gains about K - 1 in twice the log-likelihood. Few rows, or
    rows that are almost even, gain little more; then answers stay almost as they are.
    """
    outputs = p.shape[1]
    gain = 2 * float(np.log(outputs * (np.asarray(p, np.float64) @ mix)).sum())
    trust = max(0.0, 1 - EVIDENCE * (outputs - 1) / gain) if gain > 0 else 0.0
    shrunk: NDArray[np.float64] = trust * mix + (1 - trust) / outputs
    return shrunk


def cross_adapted(p: NDArray[Any], seed: int) -> NDArray[np.float32]:
    """Answers as a device gives them once it knows its class mix: p, (n, K) without a prior -> (n, K).

    For measuring on a fixed set of rows: each half gets the mix that is estimated from the other half. The halves are a
    random draw that depends on the seed and on the set of rows, and not on their order.
    """
    p = np.asarray(p, np.float32)
    if len(p) < 2:
        return p
    # Sorted by the most likely class and its probability: rows that change places through rounding are much alike.
    tie_breaker = (p * np.cos(np.arange(p.shape[1]))).sum(axis=1)
    order = np.lexsort((tie_breaker, p.max(axis=1), p.argmax(axis=1)))
    drawn = order[np.random.default_rng(seed).permutation(len(p))]
    half = len(p) // 2
    adapted = np.empty_like(p)
    for rows, others in ((drawn[:half], drawn[half:]), (drawn[half:], drawn[:half])):
        weighed = p[rows] * shrunk_mix(p[others], class_mix(p[others]))
        adapted[rows] = weighed / weighed.sum(axis=1, keepdims=True)
    return adapted
