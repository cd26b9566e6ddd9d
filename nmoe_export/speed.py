"""How fast a float graph and its reduced form run on this machine: one row, one thread, turn and turn about."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.models import Graph
from nmoe_export.source import Source

FASTER = 1.15
"""int8 must be this many times as fast as float to be worth its rounding."""
WARM_UP_RUNS = 3
MIN_RUNS = 9


def compare_speed(
    source: Source, kind: str, float_graph: bytes, reduced: bytes, latent: NDArray[np.float32]
) -> dict[str, float]:
    """Time both forms of a graph; the result is an entry of report.json's `speed`.

    `latent` is one row (1, latent_dim) for a gate or an expert; the extractor gets the source's first sample.
    """
    latent_shape = (source.latent_dim,)
    if kind == "extractor":
        row: NDArray[Any] = source.inputs[:1]
        took = latencies({"float": float_graph, "written": reduced}, source.input.shape, latent_shape, row)
    else:
        width = len(source.experts) if kind == "gate" else source.outputs
        took = latencies({"float": float_graph, "written": reduced}, latent_shape, (width,), latent)
    return {
        "float_ms": took["float"],
        "written_ms": took["written"],
        "times_faster": took["float"] / took["written"],
        "reduced_bytes": len(reduced),
    }


def latencies(
    graphs: Mapping[str, bytes],
    row_in: tuple[int, ...],
    row_out: tuple[int, ...],
    row: NDArray[Any],
    seconds: float = 0.4,
) -> dict[str, float]:
    """The median milliseconds of each graph for one row on one thread.

    The graphs take turns, so that a busy machine slows all of them alike.
    """
    sessions = {name: Graph(name, data, row_in, row_out) for name, data in graphs.items()}
    for session in sessions.values():
        for _ in range(WARM_UP_RUNS):
            session(row)
    took_ms: dict[str, list[float]] = {name: [] for name in sessions}
    until = time.perf_counter() + seconds
    runs = 0
    while time.perf_counter() < until or runs < MIN_RUNS:
        for name, session in sessions.items():
            began = time.perf_counter()
            session(row)
            took_ms[name].append((time.perf_counter() - began) * 1000)
        runs += 1
    return {name: statistics.median(values) for name, values in took_ms.items()}
