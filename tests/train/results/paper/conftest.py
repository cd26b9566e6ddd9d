"""One folder with everything that a split's tables and figures 3 and 4b need, made once."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from nmoe_train.results.paper.folder import Plan
from nmoe_train.results.paper.units import Unit, figure_3_units, table_units, top_k_units
from nmoe_train.results.paper.work import work

SPLIT = "noniid:0.5"
CLIENTS = 3
QUICK = {
    "data": {"clients": CLIENTS},
    "extractor": {"rounds": 2, "local_epochs": 1},
    "experts": {"epochs": 1},
    "gate": {"rounds": 2, "laps": 1},
    "fedsc": {"matrix_views": 1},
}


class Made(NamedTuple):
    plan: Plan
    wanted: list[Unit]
    done: dict[str, Any]
    calls: int


@pytest.fixture(scope="session")
def split():
    return SPLIT


@pytest.fixture(scope="session")
def quick():
    """Settings of a training of a second, by section."""
    return QUICK


@pytest.fixture(scope="session")
def quick_options():
    """The same as options of a command."""
    return [f"--set={s}.{k}={v}" for s, values in QUICK.items() for k, v in values.items()]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """All units of one split, made by calls that have time for one round each."""
    plan = Plan(tmp_path_factory.mktemp("paper") / "digits", "paper", QUICK)
    found = [*table_units([SPLIT], 1, rivals=True), *figure_3_units(SPLIT), *top_k_units([SPLIT], 1, CLIENTS)]
    wanted = list(dict.fromkeys(found))
    calls = 0
    while len(done := work(plan, wanted, minutes=0.0)) < len(wanted):
        calls += 1
        assert calls < 100, "a call makes no progress"
    return Made(plan, wanted, done, calls)
