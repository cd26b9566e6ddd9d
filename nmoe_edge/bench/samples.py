"""What samples say: percentiles, whether a warm-up is over, whether two measurements differ.

Pure: time is an argument. Samples are nanoseconds. Those of one round are no strangers to each other, so that two
measurements are compared by the medians of their rounds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

LEAST_SAMPLES = {0.5: 1, 0.9: 64, 0.99: 662, 0.999: 6636}
"""Share -> how many samples a percentile needs: so many that two lie beyond it in 99 of 100 runs, and not one alone."""
ALIKE = 1.05
"""How far the largest of some medians may be from the smallest for them to agree."""
STEADY_BLOCKS = 3
"""In a row, that must agree for a warm-up to be over."""
BLOCK_S, MOST_WARM_S = 0.05, 2.0
MOST_SAMPLES = 10_000
"""Of a thing in one round: what is quicker than its time ends sooner, and takes no memory for more."""
TOO_SPREAD = 1.10
"""Between the medians of rounds; over it a figure is not worth copying."""
DOUBT = 0.005
"""On either side of an interval: it holds the true ratio 99 times in a hundred."""
LEAST_CHANGE = 0.05
"""What two runs of one program may differ by, minutes apart, that neither shows within itself."""
ROOM = 1.10
"""How far from 1 either way an interval may reach for "same". As TOO_SPREAD, and not as LEAST_CHANGE: with five rounds
the interval is as wide as these lie apart, and equals whose rounds differ by 2 % would rarely be told within 5 %."""
MORE = 0.01
"""Of answers that are missing or degraded: what so small a share of them does is not worth a word."""
MOST_ROUNDS = 30

Verdict = Literal["same", "better", "worse", "cannot tell", "too few rounds"]


def percentile(samples: Sequence[int], share: float) -> int | None:
    """What so large a share of the samples stays at or under; None where there are too few to say."""
    if len(samples) < LEAST_SAMPLES[share]:
        return None
    return sorted(samples)[math.ceil(share * len(samples)) - 1]


def spread(parts: Sequence[Sequence[int]]) -> float:
    """The largest of the rounds' medians beside the smallest."""
    medians = [median(part) for part in parts]
    return max(medians) / min(medians)


def settle(block: Callable[[], Sequence[int]], clock: Callable[[], float]) -> bool:
    """Run blocks of samples until the medians of three in a row agree; False when they do not for two seconds."""
    medians: list[float] = []
    until = clock() + MOST_WARM_S
    while len(medians) < STEADY_BLOCKS or clock() < until:
        medians.append(median(block()))
        last = medians[-STEADY_BLOCKS:]
        if len(last) == STEADY_BLOCKS and max(last) <= ALIKE * min(last):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a figure."""

    ratio: float
    """The new one beside the old."""
    low: float
    high: float
    verdict: Verdict


def change(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> Change:
    """How the new rounds' medians lie to the old ones': an interval of ranks, which no outlier moves (Moses).

    Of every pair of an old round and a new one the ratio: the median of these is the change, and the interval leaves
    out as many at either end as chance alone would put there in one of two hundred runs.
    """
    before, after = [median(part) for part in old], [median(part) for part in new]
    ratios = sorted(y / x for x in before for y in after)
    ratio, cut = median(ratios), _cut(len(before), len(after))
    if cut is None:
        return Change(ratio, ratios[0], ratios[-1], "too few rounds")
    low, high = ratios[cut], ratios[-1 - cut]
    verdict: Verdict = "same" if low >= 1 / ROOM and high <= ROOM else "cannot tell"
    if low > 1 and ratio > 1 + LEAST_CHANGE:
        verdict = "worse"
    elif high < 1 and ratio < 1 / (1 + LEAST_CHANGE):
        verdict = "better"
    return Change(ratio, low, high, verdict)


def more_often(old: int, of_old: int, new: int, of_new: int) -> bool:
    """Whether something happens a point more often than before, and not by chance: three of its standard errors."""
    if not of_old or not of_new:
        return False
    rise, pooled = new / of_new - old / of_old, (old + new) / (of_old + of_new)
    return rise > MORE and rise > 3 * math.sqrt(pooled * (1 - pooled) * (1 / of_old + 1 / of_new))


def _cut(n: int, m: int) -> int | None:
    """How many ratios may be left out at either end; None where so few rounds say nothing at all.

    Metrics the ways in which n + m rounds can be ordered by how many pairs of them are (Mann and Whitney's U).
    """
    ways = [[0] * (n * m + 1) for _ in range(n + 1)]  # rounds taken, pairs -> ways
    ways[0][0] = 1
    for place in range(n + m):
        for taken in range(min(place, n - 1), -1, -1):
            passed = place - taken  # of the others, each a pair with this one
            if passed <= m:
                for pairs in range(n * m - passed, -1, -1):
                    ways[taken + 1][pairs + passed] += ways[taken][pairs]
    seen, cut = 0, None
    for pairs, count in enumerate(ways[n]):
        seen += count
        if seen > DOUBT * math.comb(n + m, n):
            return cut
        cut = pairs
    return cut
