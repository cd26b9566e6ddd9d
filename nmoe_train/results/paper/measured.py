"""The figures of one unit, as paper.json holds them: shares rounded to five decimals.

`own` is each device's own distribution (table I). `iid` is balanced rows, as many for each device as its own test set
has (table II). metrics.json of a run instead measures every device on the whole balanced test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nmoe_train.data.clients import test_samples
from nmoe_train.errors import RunError
from nmoe_train.pipeline import torch_settings, trainer_of
from nmoe_train.results.baselines import FILE, IID_ROWS, baselines
from nmoe_train.results.evaluation import DeviceRows, evaluate
from nmoe_train.run import Run
from nmoe_train.trainer import Progress

METRICS = ("accuracy", "macro_f1", "auc")


def gate_figures(run: Run) -> dict[str, Any]:
    """A fleet: {"own", "iid": accuracy, macro_f1, auc, kept_local}, the routing on own rows, and the privacy spent."""
    own = run.metrics["own"]
    balanced = evaluate(_device_rows(run)["iid"], run.record.inference)
    found = {name: _numbers(part["networked"], part) for name, part in (("own", own), ("iid", balanced))}
    found["own"]["routing"] = _rounded(own["routing"], 3)
    if "privacy" in run.metrics:
        found["privacy"] = run.metrics["privacy"]
    return found


def baseline_figures(run: Run, progress: Progress) -> dict[str, Any]:
    """{method: {"own", "iid": accuracy, macro_f1, auc}}; a mixture also has its routing."""
    found = {}
    for method, parts in baselines(run, progress).items():
        if IID_ROWS not in parts:
            raise RunError(f"{run.folder / FILE}: another version of nmoe wrote it; remove it to measure again")
        own = _numbers(parts["own"], parts["own"])
        if "routing" in parts["own"]:
            own["routing"] = _rounded(parts["own"]["routing"], 3)
        found[method] = {"own": own, "iid": _numbers(parts[IID_ROWS], parts[IID_ROWS])}
    return found


def top_k_figures(run: Run) -> dict[str, Any]:
    """{"own", "iid": [accuracy, macro_f1, auc for k = 1, 2, …]}: the run's networks and rules with every top_k."""
    rows = _device_rows(run)
    found: dict[str, Any] = {}
    for part, devices in rows.items():
        rules = [replace(run.record.inference, top_k=k) for k in range(1, run.record.experts + 1)]
        found[part] = [_numbers(evaluate(devices, rule)["networked"], {}) for rule in rules]
    return found


def _device_rows(run: Run) -> dict[str, Sequence[DeviceRows]]:
    """What every device sees of its own rows, and of its balanced rows."""
    with torch_settings(run.record.config.get("threads", 1)):
        trainer, c = trainer_of(run)
        config = trainer.config
        tests = {
            "own": trainer.clients.own_test,
            "iid": test_samples(trainer.dataset, config.data, "iid", config.seed),
        }
        return {
            name: trainer.device_rows(c, [trainer.frozen_outputs(c, part) for part in parts])
            for name, parts in tests.items()
        }


def _numbers(figures: Mapping[str, Any], routed: Mapping[str, Any]) -> dict[str, Any]:
    found = {metric: _rounded(figures[metric], 5) for metric in METRICS}
    if "kept_local" in routed:
        found["kept_local"] = _rounded(routed["kept_local"], 5)
    return found


def _rounded(value: Any, digits: int) -> Any:
    """A number, None, or lists of them, with so many decimals."""
    if isinstance(value, list):
        return [_rounded(entry, digits) for entry in value]
    return None if value is None else round(value, digits)
