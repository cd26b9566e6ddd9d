"""From what happened to each row to the figures in measurements.json, which the page is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from processes import Row, Tests

from nmoe_edge.bench.samples import MIN_SAMPLES
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.models import Models

PARTS = ("own", "iid")
"""Test sets: distributed like the device's own training samples, and balanced."""
WAYS = ("home", "peers", "degraded", "neighbour", "unanswered")
"""How a row gets its answer. See `Row.way`."""
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
LATE_S = 0.1
"""A row that took longer than this has waited for a dead device."""


def own_expert_accuracy(fleet: Path, names: list[str], tests: Tests) -> dict[str, list[float]]:
    """Accuracy of each device with nothing but its own expert, computed with the device's code."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for device, name in enumerate(names):
        models = Models(read_bundle(fleet / name))
        for part in PARTS:
            x, y = tests.of(part, device)
            answers = models.expert(models.extractor(x)).argmax(1)
            found[part].append(float(np.mean(answers == y)))
    return found


def comparison(run: Path, rows: list[Row], own_expert: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracy of every method and every device, and which expert answered which device, on both test sets."""
    metrics = json.loads((run / "metrics.json").read_bytes())
    baselines = json.loads((run / "baselines.json").read_bytes())
    found: dict[str, Any] = {"accuracy": {}, "devices": {}, "routing": {}, "kept_local": {}}
    for part in PARTS:
        fleet = fleet_accuracy(rows, part, len(own_expert[part]))
        methods = {}
        for name, figures in metrics[part].items():
            if isinstance(figures, dict) and "accuracy" in figures:
                methods[name] = figures["accuracy"]
        methods |= {name: figures[part]["accuracy"] for name, figures in baselines.items()}
        methods["alone"] = float(np.mean(own_expert[part]))
        methods["fleet"] = float(np.mean(fleet))
        weights = routing(rows, part)
        shares = weights / weights.sum(1, keepdims=True)
        found["accuracy"][part] = methods
        found["devices"][part] = {"fleet": fleet, "alone": own_expert[part]}
        found["routing"][part] = shares.tolist()
        found["kept_local"][part] = float(np.diag(shares).mean())
    return found


def fleet_accuracy(rows: list[Row], part: str, devices: int) -> list[float]:
    """Share of right answers of each device on one test set, as the running fleet gave them."""
    right: list[list[bool]] = [[] for _ in range(devices)]
    for row in rows:
        if row.part == part:
            right[row.device].append(row.right)
    return [float(np.mean(answers)) for answers in right]


def routing(rows: list[Row], part: str) -> NDArray[np.float64]:
    """Total weight of each expert in the answers to each device: (device, expert)."""
    count = 1 + max(row.device for row in rows)
    found = np.zeros((count, count))
    for row in rows:
        if row.part == part:
            found[row.device, list(row.experts)] += row.weights
    return found


def busiest(rows: list[Row], count: int) -> list[int]:
    """The devices that their peers ask most. Their loss has the largest effect."""
    asked = np.sum([routing(rows, part) for part in PARTS], axis=0)
    np.fill_diagonal(asked, 0)
    most_first = np.argsort(-asked.sum(0), kind="stable")
    return [int(device) for device in most_first[:count]]


def story(rows: list[Row], moments: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What the traffic saw before, while and after some devices were dead."""
    killed = moments["killed"]
    back = moments["back"]
    end = max(row.scheduled_s for row in rows)

    by_phase = phases(rows, killed, back)
    seconds = {"before": [0.0, killed], "dead": [killed, back], "after": [back, end]}

    undisturbed = by_phase["before"] + by_phase["after"]
    latencies = {way: latencies_ms(undisturbed, way) for way in ("home", "peers")}

    return {
        "rows": len(rows),
        "ways": counts(rows),
        "phases": {name: phase(part) | {"seconds": seconds[name]} for name, part in by_phase.items()},
        "latency_ms": {way: percentiles(values) for way, values in latencies.items()},
        "latency_curve": {way: latency_curve(values) for way, values in latencies.items()},
        "timeline": timeline(rows, end),
        "moments": moments,
        "deaths": {name: death(rows, moments, name, names.index(name)) for name in moments["noticed"]},
    }


def phases(rows: list[Row], killed: float, back: float) -> dict[str, list[Row]]:
    """The rows before, during and after the deaths. A row that was under way at the kill belongs to the deaths."""
    found: dict[str, list[Row]] = {"before": [], "dead": [], "after": []}
    for row in rows:
        if row.answered_s < killed:
            found["before"].append(row)
        elif row.scheduled_s < back:
            found["dead"].append(row)
        else:
            found["after"].append(row)
    return found


def phase(rows: list[Row]) -> dict[str, Any]:
    """Counts, accuracy and latency of some rows."""
    right: dict[str, float | None] = {}
    for part in PARTS:
        answers = [row.right for row in rows if row.part == part]
        right[part] = float(np.mean(answers)) if answers else None
    return {
        "rows": len(rows),
        "ways": counts(rows),
        "right": right,
        "latency_ms": percentiles(latencies_ms(rows)),
    }


def counts(rows: list[Row]) -> dict[str, int]:
    """Number of rows by the way to their answer."""
    found = dict.fromkeys(WAYS, 0)
    for row in rows:
        found[row.way] += 1
    return found


def latencies_ms(rows: list[Row], way: str | None = None) -> list[float]:
    """Latencies in ascending order, of the rows answered in one way or of all rows."""
    return sorted(1000 * row.latency_s for row in rows if way in (None, row.way))


def percentiles(values: list[float]) -> dict[str, float | int | None]:
    """The number of values and their percentiles; None where there are too few values for a percentile."""
    found: dict[str, float | int | None] = {"rows": len(values)}
    for name, q in PERCENTILES.items():
        enough = len(values) >= MIN_SAMPLES.get(q / 100, 1)
        found[name] = float(np.percentile(values, q)) if enough else None
    return found


def latency_curve(values: list[float]) -> list[list[float]]:
    """[milliseconds, percent of rows that are answered by then], up to 99 percent."""
    return [[float(np.percentile(values, q)), q] for q in range(100)] if values else []


def timeline(rows: list[Row], end: float) -> dict[str, Any]:
    """Counts and latency in equal stretches of the time at which rows were scheduled."""
    wide = max(0.1, round(end / 100, 1))
    count = int(end / wide)  # leaves out the last stretch, which is not full
    stretches: list[list[Row]] = [[] for _ in range(count + 1)]
    for row in rows:
        stretches[int(row.scheduled_s / wide)].append(row)
    stretches = stretches[:count]
    ways = [counts(stretch) for stretch in stretches]
    latencies = [percentiles(latencies_ms(stretch)) for stretch in stretches]
    return {
        "wide_s": wide,
        "ways": {way: [counted[way] for counted in ways] for way in WAYS},
        "p50_ms": [latency["p50"] for latency in latencies],
        "max_ms": [latency["max"] for latency in latencies],
    }


def death(rows: list[Row], moments: dict[str, Any], name: str, device: int) -> dict[str, Any]:
    """The effect of one death: times in seconds, and rows of the client that belongs to the device."""
    killed = moments["killed"]
    restarted = moments["restarted"]

    own = [row for row in rows if row.device == device]
    moved = [row for row in own if row.way == "neighbour" and row.answered_s > killed]
    late = [row.latency_s for row in moved if row.latency_s > LATE_S]

    # The device's expert answers again: first its own client, then other devices.
    by_its_expert = [row for row in rows if row.scheduled_s > restarted and device in row.experts]
    for_its_client = [row.answered_s - restarted for row in by_its_expert if row.device == row.by == device]
    for_others = [row.answered_s - restarted for row in by_its_expert if row.device != device]
    return {
        "noticed_s": moments["noticed"][name] - killed,
        "late_rows": len(late),
        "longest_s": max(late, default=None),
        "neighbour_rows": len(moved),
        "ready_s": moments["ready"][name] - restarted,
        "known_s": moments["known"][name] - restarted,
        "home_s": min(for_its_client, default=None),
        "away_s": min(for_others, default=None),
    }
