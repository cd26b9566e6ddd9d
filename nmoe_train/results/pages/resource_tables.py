"""The tables of what a training used, from `resources` of metrics.json. Runs without it get no table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmoe_train.results.pages.formats import duration, energy, operations, size

STAGE_COLUMNS = ("stage", "multiply-adds", "peak memory", "energy of the CPU")
CLIENT_COLUMNS = ("client", "multiply-adds", "time", "sent", "received")


@dataclass(frozen=True, slots=True)
class ResourceTables:
    """Rows of text."""

    stages: list[tuple[str, ...]]
    """In the order of STAGE_COLUMNS"""
    clients: list[tuple[str, ...]]
    """In the order of CLIENT_COLUMNS; totals over all stages"""
    fedavg: tuple[str, str]
    """Bytes that all clients would send and receive with FedAvg"""


def resource_tables(resources: Mapping[str, Any]) -> ResourceTables | None:
    """None for a run of nmoe 0.2, which holds no `resources`."""
    if not resources:
        return None
    stages = resources.get("stages") or {}
    measured = resources.get("measured") or {}
    rows = []
    for name in dict.fromkeys([*stages, *measured]):
        used = measured.get(name) or {}
        work = (stages.get(name) or {}).get("multiply_adds")
        rows.append((name, operations(work), size(used.get("peak_memory_bytes")), energy(used.get("energy_j"))))
    fedavg = resources.get("fedavg") or {}
    return ResourceTables(rows, _client_rows(resources), (size(fedavg.get("up")), size(fedavg.get("down"))))


def _client_rows(resources: Mapping[str, Any]) -> list[tuple[str, ...]]:
    clients = [stage["clients"] for stage in (resources.get("stages") or {}).values()]
    work = _totals([each["multiply_adds"] for each in clients])
    up = _totals([each["up"] for each in clients])
    down = _totals([each["down"] for each in clients])
    seconds = _totals(list((resources.get("client_seconds") or {}).values())) or [None] * len(work)
    columns = zip(work, seconds, up, down, strict=True)
    return [(str(i), operations(w), duration(s), size(u), size(d)) for i, (w, s, u, d) in enumerate(columns)]


def _totals(lists: Sequence[Sequence[float]]) -> list[Any]:
    """The sum over stages of each client's figure."""
    return [sum(values) for values in zip(*lists, strict=True)]
