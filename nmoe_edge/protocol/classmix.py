"""A device's own class mix, learnt from its unlabelled traffic, and how an answer is weighed with it.

Only for answers that carry no prior of their own. The mix that explains the last rows' answers best is found by
expectation maximisation; it is used from LEAST_ROWS rows on. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_ROWS = 200
"""Fewer say more about chance than about the device."""
MOST_ROWS = 2000
"""Older rows are forgotten: a camera is moved."""
_EVERY = 20
"""Rows between two estimates."""
_STEPS, _MORE_STEPS = 30, 5
"""Of the first estimate, and of one that goes on from the last."""
_MOST_NUMBERS = 400_000
"""Remembered: with a thousand classes an estimate must not hold up a device."""


class ClassMix:
    """What this device sees, class by class."""

    def __init__(self, outputs: int) -> None:
        """Knows nothing yet."""
        self.outputs = outputs
        most = max(LEAST_ROWS, min(MOST_ROWS, _MOST_NUMBERS // outputs))
        self._rows: deque[NDArray[np.float32]] = deque(maxlen=most)
        self._mix = np.full(outputs, 1 / outputs)
        self._fresh = self._estimates = 0

    @property
    def rows(self) -> int:
        """How many are remembered."""
        return len(self._rows)

    @property
    def mix(self) -> NDArray[np.float64] | None:
        """(outputs,), sums to one; None while too few rows are known."""
        return self._mix if self.rows >= LEAST_ROWS else None

    def weighed(self, p: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities without a prior, weighed with the mix so far; then they are learnt from. p: (rows, outputs)"""
        mix = self.mix
        weighed = p * mix if mix is not None else p
        weighed = weighed / weighed.sum(1, keepdims=True)
        self._rows.extend(np.array(p, np.float32))
        self._fresh += len(p)
        if self._fresh >= _EVERY and self.rows >= LEAST_ROWS:
            first = self._estimates == 0
            self._mix = class_mix(np.stack(self._rows), self._mix, _STEPS if first else _MORE_STEPS)
            self._fresh, self._estimates = 0, self._estimates + 1
        return np.asarray(weighed, np.float32)

    def remembered(self) -> NDArray[np.float32]:
        """Every row, to be kept across a restart: (rows, outputs)."""
        return np.stack(self._rows) if self._rows else np.zeros((0, self.outputs), np.float32)

    def recall(self, rows: NDArray[Any]) -> None:
        """Take up what was kept; ValueError where it is not that."""
        found = np.asarray(rows, np.float32)
        if found.ndim != 2 or found.shape[1] != self.outputs:
            raise ValueError(f"rows of {list(found.shape[1:])} numbers, not {self.outputs}")
        if not np.isfinite(found).all() or (found < 0).any() or not (found.sum(1) > 0).all():
            raise ValueError("rows that are no probabilities")
        self._rows.clear()
        self._rows.extend(np.array(found))
        if self.rows >= LEAST_ROWS:
            self._mix = class_mix(np.stack(self._rows))


def class_mix(p: NDArray[Any], start: NDArray[np.float64] | None = None, steps: int = _STEPS) -> NDArray[np.float64]:
    """The class mix that explains these answers best. (rows, outputs) -> (outputs,)"""
    p = np.asarray(p, np.float64)
    mix = np.full(p.shape[1], 1 / p.shape[1]) if start is None else start
    for _ in range(steps):
        posterior = p * mix
        mix = (posterior / posterior.sum(1, keepdims=True)).sum(0) + 0.5
        mix = mix / mix.sum()
    return mix
