from __future__ import annotations

import itertools
import math
import random

import pytest

from nmoe_edge.bench.samples import MIN_SAMPLES, _cut, change, percentile, settle, spread


def rounds(rng, p50=1_000_000.0, between=0.01, count=5, samples=200):
    """Rounds of samples: medians vary a little between rounds, samples vary more within one."""

    def one_round(middle):
        return [max(1, int(middle * math.exp(rng.gauss(0, 0.05)))) for _ in range(samples)]

    middles = [p50 * math.exp(rng.gauss(0, between)) for _ in range(count)]
    return [one_round(middle) for middle in middles]


def slower(parts, by):
    def scaled(part):
        return [int(ns * by) for ns in part]

    return [scaled(part) for part in parts]


def test_a_percentile_is_the_smallest_sample_that_this_share_does_not_exceed():
    samples = list(range(1000, 0, -1))
    assert [percentile(samples, share) for share in (0.5, 0.9, 0.99)] == [500, 900, 990]


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_a_percentile_needs_enough_samples_for_two_beyond_it_99_times_in_100(share):
    def two_beyond(n):
        return 1 - share**n - n * (1 - share) * share ** (n - 1)

    least = MIN_SAMPLES[share]
    assert two_beyond(least - 1) < 0.99 <= two_beyond(least)
    assert percentile([5] * least, share) == 5
    assert percentile([5] * (least - 1), share) is None


def test_a_warm_up_ends_when_three_blocks_in_a_row_agree():
    medians = iter([900, 500, 300, 104, 100, 102, 7])
    assert settle(lambda: [next(medians)] * 3, lambda: 0.0)
    assert next(medians) == 7


def test_a_warm_up_that_never_settles_ends_after_its_time_and_returns_false():
    seconds, takes = itertools.count(), itertools.cycle([100, 200])
    assert not settle(lambda: [next(takes)], lambda: next(seconds) * 0.1)


def test_a_warm_up_on_a_slow_board_has_at_least_three_blocks():
    seconds = itertools.count()
    assert settle(lambda: [100], lambda: next(seconds) * 10)


def test_the_spread_of_rounds_is_the_ratio_of_their_largest_and_smallest_median():
    assert spread([[1, 100, 1000], [110, 110]]) == pytest.approx(1.1)


def test_a_measurement_is_the_same_as_itself():
    parts = rounds(random.Random(0))
    it = change(parts, parts)
    assert (it.verdict, it.ratio) == ("same", 1.0)
    assert it.low < 1 < it.high


@pytest.mark.parametrize(("by", "verdict"), [(1.1, "worse"), (1 / 1.1, "better"), (1.04, "same"), (1 / 1.04, "same")])
def test_a_change_beyond_the_noise_is_found_and_its_interval_holds_the_true_ratio(by, verdict):
    it = change(rounds(random.Random(1)), slower(rounds(random.Random(2)), by))
    assert it.verdict == verdict
    assert it.low <= by <= it.high


def test_differences_between_rounds_count_as_noise():
    it = change(rounds(random.Random(1), between=0.2), slower(rounds(random.Random(2), between=0.2), 1.1))
    assert it.verdict == "cannot tell"


@pytest.mark.parametrize(
    ("last", "verdict"), [(1.09, "same"), (1 / 1.09, "same"), (1.11, "cannot tell"), (1 / 1.11, "cannot tell")]
)
def test_two_measurements_are_the_same_only_if_the_whole_interval_is_close_to_1(last, verdict):
    old = [[100_000]] * 5
    assert change(old, [*old[:4], [int(100_000 * last)]]).verdict == verdict


def test_five_rounds_are_enough_to_call_equal_measurements_the_same():
    rng = random.Random(6)
    verdicts = [change(rounds(rng, between=0.02), rounds(rng, between=0.02)).verdict for _ in range(100)]
    assert verdicts.count("same") > 90


def test_one_disturbed_round_does_not_make_a_measurement_worse():
    parts = rounds(random.Random(3))
    assert change(parts, [*parts[:4], slower(parts[4:], 50)[0]]).verdict == "cannot tell"


def test_three_rounds_are_too_few_for_a_verdict():
    parts = rounds(random.Random(4), count=3)
    assert change(parts, slower(parts, 2)).verdict == "too few rounds"


def test_equal_measurements_are_hardly_ever_called_worse():
    rng = random.Random(5)
    verdicts = [
        change(rounds(rng, between=0.1, samples=9), rounds(rng, between=0.1, samples=9)).verdict for _ in range(400)
    ]
    assert verdicts.count("worse") <= 6  # the interval allows one in two hundred


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (4, 4), (5, 5), (5, 7), (6, 4)])
def test_the_interval_leaves_out_as_much_as_counting_every_order_allows(n, m):
    everything = set(range(n + m))

    def pairs_in_order(chosen):
        others = everything - set(chosen)
        return sum(other < one for one in chosen for other in others)

    counts = [pairs_in_order(chosen) for chosen in itertools.combinations(range(n + m), n)]

    def orders_up_to(cut):
        return sum(count <= cut for count in counts)

    fitting = [cut for cut in range(n * m) if orders_up_to(cut) <= 0.005 * len(counts)]
    assert _cut(n, m) == (max(fitting) if fitting else None)


def test_the_interval_of_thirty_rounds_is_computed_quickly():
    assert _cut(30, 30) > 200
