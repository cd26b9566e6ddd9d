"""What a device counts: events by name, and how long things took. One place, shown by status."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

_STEPS = 8
"""Buckets for each doubling: a quantile is within nine percent."""
_LEAST_S = 1e-6


class Histogram:
    """Durations in buckets that grow with them: bounded, whatever comes."""

    def __init__(self) -> None:
        """Empty."""
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self._buckets[max(0, int(math.log2(max(seconds, _LEAST_S) / _LEAST_S) * _STEPS))] += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that so large a share stayed under; None when nothing was counted."""
        left = math.ceil(share * self.count)
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return _LEAST_S * float(2.0 ** ((bucket + 0.5) / _STEPS))
        return None


class Metrics:
    """All of a device's."""

    def __init__(self) -> None:
        """Empty."""
        self.events: Counter[str] = Counter()
        self._took: dict[str, Histogram] = {}

    def took(self, what: str, seconds: float) -> None:
        """Something took so long."""
        if what not in self._took:
            self._took[what] = Histogram()
        self._took[what].add(seconds)

    def facts(self) -> dict[str, Any]:
        """For a status report: counts, and milliseconds."""
        took = {
            name: {"count": h.count, **{f"p{q}_ms": _ms(h.quantile(q / 100)) for q in (50, 90, 99)}}
            for name, h in sorted(self._took.items())
        }
        return {"counts": dict(sorted((name, n) for name, n in self.events.items() if n)), "took": took}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
