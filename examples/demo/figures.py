"""From what became of each row to the figures of measurements.json, of which the page is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from processes import Row, Tests

from nmoe_edge.bench.samples import LEAST_SAMPLES
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.models import Models

WAYS = ("home", "peers", "degraded", "neighbour", "unanswered")
"""How a row comes to its answer, or does not."""
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
LATE_S = 0.1
"""What waited for a dead device has waited longer."""


def alone(fleet: Path, names: list[str], tests: Tests) -> dict[str, list[float]]:
    """How often each device would be right with nothing but its own expert, through the device's own code."""
    found: dict[str, list[float]] = {"own": [], "iid": []}
    for device, name in enumerate(names):
        models = Models(read_bundle(fleet / name))
        for part, shares in found.items():
            x, y = tests.of(part, device)
            shares.append(float(np.mean(models.expert(models.extractor(x)).argmax(1) == y)))
    return found


def worth(run: Path, rows: list[Row], own_expert: dict[str, list[float]]) -> dict[str, Any]:
    """Accuracies of every method, of the fleet and of its experts alone, and who answered whom, on both test sets."""
    metrics = json.loads((run / "metrics.json").read_bytes())
    baselines = json.loads((run / "baselines.json").read_bytes())
    found: dict[str, Any] = {"accuracy": {}, "devices": {}, "routing": {}, "kept_local": {}}
    for part in ("own", "iid"):
        mine = [
            [row.right for row in rows if (row.part, row.device) == (part, d)] for d in range(len(own_expert[part]))
        ]
        fleet = [float(np.mean(right)) for right in mine]
        methods = {name: figures["accuracy"] for name, figures in metrics[part].items() if isinstance(figures, dict)}
        methods |= {name: figures[part]["accuracy"] for name, figures in baselines.items()}
        found["accuracy"][part] = methods | {"alone": float(np.mean(own_expert[part])), "fleet": float(np.mean(fleet))}
        found["devices"][part] = {"fleet": fleet, "alone": own_expert[part]}
        shares = routing(rows, part)
        shares /= shares.sum(1, keepdims=True)
        found["routing"][part] = shares.tolist()
        found["kept_local"][part] = float(np.diag(shares).mean())
    return found


def routing(rows: list[Row], part: str) -> NDArray[np.float64]:
    """How much of each device's rows each expert answered (device, expert)."""
    count = 1 + max(row.device for row in rows)
    found = np.zeros((count, count))
    for row in rows:
        if row.part == part:
            found[row.device, list(row.experts)] += row.weights
    return found


def story(rows: list[Row], moments: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What the traffic saw before, while and after some were dead."""
    end = max(row.due_s for row in rows)
    killed, back = moments["killed"], moments["back"]
    seconds = {"before": (0.0, killed), "dead": (killed, back), "after": (back, end)}
    of_phase: dict[str, list[Row]] = {name: [] for name in seconds}
    for row in rows:  # one that was under way when the kill came has felt it
        of_phase["before" if row.answered_s < killed else "dead" if row.due_s < back else "after"].append(row)
    calm = of_phase["before"] + of_phase["after"]
    took = {way: sorted(1000 * row.latency_s for row in calm if row.way == way) for way in ("home", "peers")}
    return {
        "rows": len(rows),
        "ways": {way: sum(row.way == way for row in rows) for way in WAYS},
        "phases": {name: phase(part) | {"seconds": list(seconds[name])} for name, part in of_phase.items()},
        "latency_ms": {way: percentiles(values) for way, values in took.items()},
        "latency_curve": {
            way: [[float(np.percentile(values, q)), q] for q in (*range(0, 99), 99)] if values else []
            for way, values in took.items()
        },
        "timeline": timeline(rows, end),
        "moments": moments,
        "deaths": {name: death(rows, moments, name, names.index(name)) for name in moments["noticed"]},
    }


def phase(rows: list[Row]) -> dict[str, Any]:
    """Counts, accuracy and latency of some rows."""
    right = {part: [row.right for row in rows if row.part == part] for part in ("own", "iid")}
    return {
        "rows": len(rows),
        "ways": {way: sum(row.way == way for row in rows) for way in WAYS},
        "right": {part: float(np.mean(found)) if found else None for part, found in right.items()},
        "latency_ms": percentiles([1000 * row.latency_s for row in rows]),
    }


def percentiles(values: list[float]) -> dict[str, float | int | None]:
    """How many they are, and the slowest half, tenth, hundredth and one of them; None where they are too few to say."""
    return {"rows": len(values)} | {
        name: float(np.percentile(values, q)) if len(values) >= LEAST_SAMPLES.get(q / 100, 1) else None
        for name, q in PERCENTILES.items()
    }


def timeline(rows: list[Row], end: float) -> dict[str, Any]:
    """Counts, latency and accuracy, stretch by stretch of the time at which rows were due."""
    wide = max(0.1, round(end / 100, 1))
    count = int(end / wide)  # the last one would be half a stretch
    parts: list[list[Row]] = [[] for _ in range(count + 1)]
    for row in rows:
        parts[int(row.due_s / wide)].append(row)
    parts = parts[:count]
    took = [percentiles([1000 * row.latency_s for row in part]) for part in parts]
    return {
        "wide_s": wide,
        "ways": {way: [sum(row.way == way for row in part) for part in parts] for way in WAYS},
        "p50_ms": [found["p50"] for found in took],
        "max_ms": [found["max"] for found in took],
    }


def death(rows: list[Row], moments: dict[str, Any], name: str, device: int) -> dict[str, Any]:
    """What one death cost, in seconds, and in rows of its own application."""
    began = moments["restarted"]
    moved = [r for r in rows if r.device == device and r.way == "neighbour" and r.answered_s > moments["killed"]]
    late = [row.latency_s for row in moved if row.latency_s > LATE_S]
    again = [row for row in rows if row.due_s > began and device in row.experts]
    home = [row.answered_s - began for row in again if row.device == row.by == device]
    away = [row.answered_s - began for row in again if row.device != device]
    return {
        "noticed_s": moments["noticed"][name] - moments["killed"],
        "late_rows": len(late),
        "longest_s": max(late, default=None),
        "neighbour_rows": len(moved),
        "ready_s": moments["ready"][name] - began,
        "known_s": moments["known"][name] - began,
        "home_s": min(home, default=None),
        "away_s": min(away, default=None),
    }


def busiest(rows: list[Row], count: int) -> list[int]:
    """The devices whose experts the others asked most: they will be missed most."""
    asked = np.sum([routing(rows, part) for part in ("own", "iid")], axis=0)
    np.fill_diagonal(asked, 0)
    return [int(device) for device in np.argsort(-asked.sum(0), kind="stable")[:count]]
