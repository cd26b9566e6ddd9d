from __future__ import annotations

import json

import numpy as np
import pytest

from nmoe_edge.device.metrics import Histogram, Metrics


def histogram(seconds):
    made = Histogram()
    for one in seconds:
        made.add(one)
    return made


@pytest.mark.parametrize("middle", [20e-6, 1e-3, 0.3])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantiles_are_within_ten_percent(middle, share):
    took = middle * np.random.default_rng(0).lognormal(0, 1, 5000)
    assert histogram(took).quantile(share) == pytest.approx(np.quantile(took, share), rel=0.1)


def test_of_nothing_there_is_no_quantile():
    assert Histogram().quantile(0.5) is None


def test_of_one_every_quantile_is_that_one():
    assert [histogram([0.25]).quantile(q) for q in (0.01, 0.5, 1.0)] == pytest.approx([0.25] * 3, rel=0.1)


def test_many_durations_of_every_size_take_few_buckets():
    made = histogram(10.0 ** np.random.default_rng(0).uniform(-9, 6, 20_000))
    assert made.count == 20_000
    assert len(made._buckets) <= 8 * 41  # eight a doubling, from a microsecond to a million seconds


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_clock_that_stood_still_or_went_back_is_a_microsecond(seconds):
    assert histogram([seconds]).quantile(0.5) == pytest.approx(1e-6, rel=0.1)


def test_facts_are_counts_and_milliseconds_that_json_holds():
    counts = Metrics()
    counts.events["asked"] += 2
    for _ in range(3):
        counts.took("result", 0.25)
    facts = json.loads(json.dumps(counts.facts(), allow_nan=False))
    assert facts["counts"] == {"asked": 2}
    assert facts["took"]["result"]["count"] == 3
    for share in ("p50_ms", "p90_ms", "p99_ms"):
        assert facts["took"]["result"][share] == pytest.approx(250, rel=0.1)


def test_what_never_happened_is_not_shown():
    counts = Metrics()
    counts.events["asked"] += 0
    assert counts.facts() == {"counts": {}, "took": {}}
