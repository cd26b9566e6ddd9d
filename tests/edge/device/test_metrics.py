from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from nmoe_edge.device.metrics import COUNTERS, DURATIONS, Histogram, Metrics
from nmoe_edge.protocol.exchange import Why
from nmoe_edge.protocol.health import Failure
from nmoe_edge.protocol.messages import Reason

SERVING = Path(__file__).parents[3] / "nmoe_edge" / "device" / "SERVING.md"


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


def test_an_empty_histogram_has_no_quantile():
    assert Histogram().quantile(0.5) is None


def test_every_quantile_of_one_duration_is_that_duration():
    assert [histogram([0.25]).quantile(q) for q in (0.01, 0.5, 1.0)] == pytest.approx([0.25] * 3, rel=0.1)


def test_many_durations_of_every_size_take_few_buckets():
    made = histogram(10.0 ** np.random.default_rng(0).uniform(-9, 6, 20_000))
    assert made.count == 20_000
    assert len(made._buckets) <= 8 * 41  # eight per doubling, from a microsecond to a million seconds


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_zero_and_negative_durations_count_as_a_microsecond(seconds):
    assert histogram([seconds]).quantile(0.5) == pytest.approx(1e-6, rel=0.1)


def test_the_report_has_counts_and_milliseconds_and_fits_json():
    metrics = Metrics()
    metrics.counts["asks"] += 2
    for _ in range(3):
        metrics.took("request_remote", 0.25)
    assert json.loads(json.dumps(metrics.counts_report(), allow_nan=False)) == {"asks": 2}
    durations = json.loads(json.dumps(metrics.durations_report(), allow_nan=False))
    assert durations["request_remote"]["count"] == 3
    for share in ("p50_ms", "p90_ms", "p99_ms"):
        assert durations["request_remote"][share] == pytest.approx(250, rel=0.1)


def test_what_never_occurred_is_not_reported():
    metrics = Metrics()
    metrics.counts["asks"] += 0
    assert (metrics.counts_report(), metrics.durations_report()) == ({}, {})


def test_a_name_that_is_not_listed_is_an_error():
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.counts["rows kept at home"] += 1
    with pytest.raises(KeyError):
        metrics.took("requests at home", 1.0)


def test_names_are_identifiers():
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in (*COUNTERS, *DURATIONS))


def put_together():
    """The names that the code puts together, by a reason or a failure."""
    reasons = {reason.name.lower() for reason in Reason}
    names = {f"answers_refused_{reason}" for reason in reasons}
    names |= {f"requests_refused_{reason}" for reason in reasons - {"wrong_trunk"}}
    names |= {f"asks_refused_{reason}" for reason in reasons - {"shutting_down"}}
    names |= {f"peers_{failure}" for failure in get_args(Failure)}
    return names | {f"calls_{why}" for why in get_args(Why)}


def test_every_listed_name_is_used_and_every_name_put_together_is_listed():
    source = "".join(path.read_text() for path in SERVING.parent.glob("*.py") if path.stem != "metrics")
    unused = {name for name in (*COUNTERS, *DURATIONS) if f'"{name}"' not in source}
    assert unused <= put_together() <= COUNTERS.keys()


@pytest.mark.parametrize(("heading", "names"), [("Counters", COUNTERS), ("Durations", DURATIONS)])
def test_serving_md_lists_every_name_with_its_meaning(heading, names):
    section = SERVING.read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.M)) == names
