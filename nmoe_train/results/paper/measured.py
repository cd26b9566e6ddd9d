"""The figures of one unit, as paper.json holds them: shares rounded to five decimals.

`own` is each device's own distribution (table I). `iid` is balanced rows of each device (table II): `iid_rows` in
metrics.json, where `iid` instead is the whole balanced test set for every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nmoe_train.data.clients import IID_ROWS
from nmoe_train.errors import RunError
from nmoe_train.results.baselines import FILE, baselines
from nmoe_train.run import Run
from nmoe_train.trainer import Progress

METRICS = ("accuracy", "macro_f1", "auc")


def gate_figures(run: Run) -> dict[str, Any]:
    """A fleet: {"own", "iid": accuracy, macro_f1, auc, kept_local}, the routing on own rows, and the privacy spent."""
    found = {}
    for name, part in _parts(run.metrics, str(run.folder)).items():
        found[name] = _numbers(part["networked"]) | {"kept_local": _rounded(part["kept_local"], 5)}
    found["own"]["routing"] = _rounded(run.metrics["own"]["routing"], 3)
    if "privacy" in run.metrics:
        found["privacy"] = run.metrics["privacy"]
    return found


def baseline_figures(run: Run, methods: Sequence[str], progress: Progress) -> dict[str, Any]:
    """{method: {"own", "iid": accuracy, macro_f1, auc}}; a mixture also has its routing on own rows."""
    found = {}
    measured = baselines(run, progress, methods)
    for method in methods:
        figures = measured[method]
        found[method] = {name: _numbers(part) for name, part in _parts(figures, str(run.folder / FILE)).items()}
        if "routing" in figures["own"]:
            found[method]["own"]["kept_local"] = _rounded(figures["own"]["kept_local"], 5)
            found[method]["own"]["routing"] = _rounded(figures["own"]["routing"], 3)
    return found


def _parts(figures: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The figures of both test sets."""
    if IID_ROWS not in figures:
        raise RunError(
            f"{source}: has no figures on balanced rows of each device ({IID_ROWS}); either an older version of nmoe"
            " wrote it, and then remove it, or the test set lacks a class"
        )
    return {"own": figures["own"], "iid": figures[IID_ROWS]}


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: _rounded(figures[metric], 5) for metric in METRICS}


def _rounded(value: Any, digits: int) -> Any:
    """A number, None, or lists of them, with so many decimals."""
    if isinstance(value, list):
        return [_rounded(entry, digits) for entry in value]
    return None if value is None else round(value, digits)
