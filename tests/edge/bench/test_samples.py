from __future__ import annotations

import itertools
import math
import random

import pytest

from nmoe_edge.bench.samples import LEAST_SAMPLES, _cut, change, percentile, settle, spread


def rounds(rng, p50=1_000_000.0, between=0.01, count=5, samples=200):
    """Rounds of samples: each round a little off, and every sample off a little more."""
    middles = [p50 * math.exp(rng.gauss(0, between)) for _ in range(count)]
    return [[max(1, int(m * math.exp(rng.gauss(0, 0.05)))) for _ in range(samples)] for m in middles]


def slower(parts, by):
    return [[int(ns * by) for ns in part] for part in parts]


def test_a_percentile_is_a_sample_that_so_many_stay_at_or_under():
    samples = list(range(1000, 0, -1))
    assert [percentile(samples, share) for share in (0.5, 0.9, 0.99)] == [500, 900, 990]


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_a_percentile_needs_so_many_samples_that_two_lie_beyond_it_99_times_in_100(share):
    def two_beyond(n):
        return 1 - share**n - n * (1 - share) * share ** (n - 1)

    least = LEAST_SAMPLES[share]
    assert two_beyond(least - 1) < 0.99 <= two_beyond(least)
    assert percentile([5] * least, share) == 5
    assert percentile([5] * (least - 1), share) is None


def test_a_warm_up_is_over_when_three_blocks_in_a_row_agree():
    medians = iter([900, 500, 300, 104, 100, 102, 7])
    assert settle(lambda: [next(medians)] * 3, lambda: 0.0)
    assert next(medians) == 7


def test_a_warm_up_that_never_settles_ends_all_the_same_and_says_so():
    seconds, takes = itertools.count(), itertools.cycle([100, 200])
    assert not settle(lambda: [next(takes)], lambda: next(seconds) * 0.1)


def test_on_a_slow_board_a_warm_up_has_its_three_blocks_whatever_they_take():
    seconds = itertools.count()
    assert settle(lambda: [100], lambda: next(seconds) * 10)


def test_rounds_lie_apart_by_the_largest_median_beside_the_smallest():
    assert spread([[1, 100, 1000], [110, 110]]) == pytest.approx(1.1)


def test_a_record_is_no_worse_than_itself():
    parts = rounds(random.Random(0))
    it = change(parts, parts)
    assert (it.verdict, it.ratio) == ("same", 1.0)
    assert it.low < 1 < it.high


@pytest.mark.parametrize(("by", "verdict"), [(1.1, "worse"), (1 / 1.1, "better"), (1.04, "same"), (1 / 1.04, "same")])
def test_a_change_beyond_the_noise_is_seen_and_its_interval_holds_the_truth(by, verdict):
    it = change(rounds(random.Random(1)), slower(rounds(random.Random(2)), by))
    assert it.verdict == verdict
    assert it.low <= by <= it.high


def test_what_rounds_themselves_differ_by_is_noise():
    it = change(rounds(random.Random(1), between=0.2), slower(rounds(random.Random(2), between=0.2), 1.1))
    assert it.verdict == "cannot tell"


@pytest.mark.parametrize(
    ("last", "verdict"), [(1.09, "same"), (1 / 1.09, "same"), (1.11, "cannot tell"), (1 / 1.11, "cannot tell")]
)
def test_two_are_the_same_only_where_the_whole_interval_is_close_to_1(last, verdict):
    old = [[100_000]] * 5
    assert change(old, [*old[:4], [int(100_000 * last)]]).verdict == verdict


def test_five_rounds_are_enough_for_equals_to_be_called_the_same():
    rng = random.Random(6)
    pairs = [[rounds(rng, between=0.02) for _ in range(2)] for _ in range(100)]
    verdicts = [change(old, new).verdict for old, new in pairs]
    assert verdicts.count("same") > 90


def test_one_round_that_somebody_disturbed_makes_nothing_worse():
    parts = rounds(random.Random(3))
    assert change(parts, [*parts[:4], slower(parts[4:], 50)[0]]).verdict == "cannot tell"


def test_three_rounds_are_too_few_to_say():
    parts = rounds(random.Random(4), count=3)
    assert change(parts, slower(parts, 2)).verdict == "too few rounds"


def test_of_many_pairs_of_equals_hardly_any_is_called_worse():
    rng = random.Random(5)
    verdicts = [
        change(rounds(rng, between=0.1, samples=9), rounds(rng, between=0.1, samples=9)).verdict for _ in range(400)
    ]
    assert verdicts.count("worse") <= 6  # one in two hundred is what the interval allows


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (4, 4), (5, 5), (5, 7), (6, 4)])
def test_what_the_interval_leaves_out_is_counted_of_all_orders(n, m):
    orders = [
        sum(1 for one in mine for other in set(range(n + m)) - set(mine) if other < one)
        for mine in itertools.combinations(range(n + m), n)
    ]
    fitting = [cut for cut in range(n * m) if sum(u <= cut for u in orders) <= 0.005 * len(orders)]
    assert _cut(n, m) == (max(fitting) if fitting else None)


def test_thirty_rounds_are_counted_in_no_time():
    assert _cut(30, 30) > 200
