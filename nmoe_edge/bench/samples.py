"""Statistics of latency samples: percentiles, the end of a warm-up, and whether two measurements differ.

Pure functions: time is an argument. Samples are nanoseconds. Samples of one round are correlated, so a comparison uses
only the median of each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

MIN_SAMPLES = {0.5: 1, 0.9: 64, 0.99: 662, 0.999: 6636}
"""Percentile, as a share -> the fewest samples it needs: in 99 of 100 runs, at least two samples then lie beyond it."""
ALIKE = 1.05
"""A warm-up is over when the medians of its last blocks are within this factor of each other."""
STEADY_BLOCKS = 3
"""A warm-up ends when the medians of this many consecutive blocks agree."""
BLOCK_S = 0.05
"""Length of a block of the warm-up."""
MAX_WARM_S = 2.0
"""Longest warm-up, unless its first three blocks take longer."""
MAX_SAMPLES = 10_000
"""Samples of one step in one round; a fast step ends its round early, which bounds the memory."""
TOO_SPREAD = 1.10
"""If the medians of the rounds differ by a larger factor, a note warns that the figure is not reliable."""
ERROR_RATE = 0.005
"""Error probability at either end of the interval, so that it holds the true ratio in 99 of 100 cases."""
MIN_CHANGE = 0.05
"""Two runs of one program, minutes apart, may differ by this much although neither shows it within itself."""
SAME_WITHIN = 1.10
"""For "same", the interval must lie between 1/SAME_WITHIN and SAME_WITHIN. The value is that of TOO_SPREAD, not of
MIN_CHANGE: with five rounds the interval is as wide as the rounds lie apart, and an unchanged program with rounds that
differ by 2 % would rarely be "same" within 5 %."""
MIN_RISE = 0.01
"""A smaller rise in the share of missing, refused or degraded answers is ignored."""
MAX_ROUNDS = 30

Verdict = Literal["same", "better", "worse", "cannot tell", "too few rounds"]


def percentile(samples: Sequence[int], share: float) -> int | None:
    """The smallest sample that at least this share of the samples does not exceed; None if there are too few."""
    if len(samples) < MIN_SAMPLES[share]:
        return None
    return sorted(samples)[math.ceil(share * len(samples)) - 1]


def spread(parts: Sequence[Sequence[int]]) -> float:
    """Ratio of the largest to the smallest median of the rounds. parts: the samples of each round."""
    medians = [median(part) for part in parts]
    return max(medians) / min(medians)


def settle(block: Callable[[], Sequence[int]], clock: Callable[[], float]) -> bool:
    """Warm up: run blocks of samples until the medians of three in a row agree; False if they do not within 2 s."""
    medians: list[float] = []
    until = clock() + MAX_WARM_S
    while len(medians) < STEADY_BLOCKS or clock() < until:
        medians.append(median(block()))
        last = medians[-STEADY_BLOCKS:]
        if len(last) == STEADY_BLOCKS and max(last) <= ALIKE * min(last):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Change:
    """How a figure differs between two measurements."""

    ratio: float
    """New divided by old."""
    low: float
    """Lower end of the interval of the ratio."""
    high: float
    verdict: Verdict


def change(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> Change:
    """Compare the medians of the new rounds with those of the old ones, by ranks, so that no outlier decides (Moses).

    The change is the median of the ratios of every pair of an old and a new round. Its interval leaves out as many
    ratios at either end as chance alone puts there in one of two hundred runs.
    """
    before = [median(part) for part in old]
    after = [median(part) for part in new]
    ratios = sorted(y / x for x in before for y in after)
    ratio = median(ratios)
    cut = _cut(len(before), len(after))
    if cut is None:
        return Change(ratio, ratios[0], ratios[-1], "too few rounds")
    low = ratios[cut]
    high = ratios[-1 - cut]
    verdict: Verdict = "same" if low >= 1 / SAME_WITHIN and high <= SAME_WITHIN else "cannot tell"
    if low > 1 and ratio > 1 + MIN_CHANGE:
        verdict = "worse"
    elif high < 1 and ratio < 1 / (1 + MIN_CHANGE):
        verdict = "better"
    return Change(ratio, low, high, verdict)


def more_often(old: int, of_old: int, new: int, of_new: int) -> bool:
    """Whether new of of_new is a higher share than old of of_old: by over one point, and over three standard errors."""
    if not of_old or not of_new:
        return False
    rise = new / of_new - old / of_old
    pooled = (old + new) / (of_old + of_new)
    standard_error = math.sqrt(pooled * (1 - pooled) * (1 / of_old + 1 / of_new))
    return rise > MIN_RISE and rise > 3 * standard_error


def _cut(n: int, m: int) -> int | None:
    """How many ratios of n and m rounds the interval leaves out at either end; None if there are too few rounds.

    Counts the orders of n + m rounds by how many pairs stand in a given order (the U of Mann and Whitney).
    """
    ways = [[0] * (n * m + 1) for _ in range(n + 1)]  # [rounds of the first group][pairs] -> number of orders
    ways[0][0] = 1
    for position in range(n + m):
        for chosen in range(min(position, n - 1), -1, -1):
            passed = position - chosen  # rounds of the other group that come earlier: each is a pair with this one
            if passed <= m:
                for pairs in range(n * m - passed, -1, -1):
                    ways[chosen + 1][pairs + passed] += ways[chosen][pairs]
    orders = 0
    cut = None
    for pairs, count in enumerate(ways[n]):
        orders += count
        if orders > ERROR_RATE * math.comb(n + m, n):
            return cut
        cut = pairs
    return cut
