"""A process that opens a bundle, answers for a while, and prints what it saw of itself: python -m nmoe_edge.bench.probe

It is its own process so that nothing was loaded, opened or warmed before; measure.py starts one a round. Imports
stand where they are measured. It knows no socket; what a device does besides is measured on a device that serves.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmoe_edge.bench.board import Meter, read_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmoe_edge.models import Models

BATCHES = (1, 8)
"""Rows answered together."""
MOST_INPUTS = 16
"""Of the self-test's, that are cycled."""
WHOLE = "whole path"
Answering = Callable[["NDArray[Any]"], object]


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment, and the memory of it."""

    stage: str
    """What has just been done."""
    at_ns: int
    """On the system's monotonic clock, which all processes share."""
    rss: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What answering so many rows together took."""

    rows: int
    settled: bool
    mean_w: float | None
    samples: Mapping[str, tuple[int, ...]]
    """Step -> nanoseconds."""


@dataclass(frozen=True, slots=True)
class Probe:
    """All that it saw."""

    digest: str
    """Of the bundle."""
    runtime: str
    provider: str
    marks: tuple[Mark, ...]
    first_ns: int
    """What the first answer took."""
    batches: tuple[Batch, ...]
    pss: int | None
    peak: int | None


def main() -> None:
    """Measure a bundle: BUNDLE THREADS PROVIDER SECONDS; JSON on stdout, or one line on stderr and exit 1."""
    marks: list[Mark] = []

    def mark(stage: str) -> None:
        now = time.monotonic_ns()
        marks.append(Mark(stage, now, read_memory().rss))

    mark("python")
    if len(sys.argv) != 5:
        sys.exit("usage: python -m nmoe_edge.bench.probe BUNDLE THREADS PROVIDER SECONDS; for people: nmoe-edge bench")
    folder, threads, provider, seconds = sys.argv[1:]
    import numpy as np

    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.memory import trim
    from nmoe_edge.common.schema import to_plain
    from nmoe_edge.errors import EdgeError
    from nmoe_edge.models import RUNTIME, Models

    for late in ("bench.samples", "protocol.exchange"):  # else the first answer would pay for them
        importlib.import_module(f"nmoe_edge.{late}")
    mark("imports")
    try:
        bundle = read_bundle(folder)
        mark("bundle")
        models = Models(bundle, int(threads), provider, mark)
        inputs = bundle.selftest.inputs[:MOST_INPUTS]
        del bundle
        # As a device that serves does before it says that it is ready.
        gc.collect()
        gc.freeze()
        trim()
        mark("ready")
        answer = _whole_path(models)
        began = time.perf_counter_ns()
        answer(inputs[:1])
        first_ns = time.perf_counter_ns() - began
        mark("first answer")
        # Every batch is a view of one array: what a device does not hold is not to count as its memory.
        again = np.concatenate([inputs] * (1 + -(-max(BATCHES) // len(inputs))))[: len(inputs) + max(BATCHES) - 1]
        taken = []
        for rows in BATCHES:
            fed = [again[i : i + rows] for i in range(len(inputs))]
            taken.append(_taken(models, answer, fed, float(seconds) / len(BATCHES)))
        mark("steady")
    except EdgeError as error:
        sys.exit(str(error))
    memory = read_memory()
    batches = [
        Batch(rows, settled, mean_w, {step: tuple(samples) for step, samples in by_step.items()})
        for rows, (settled, mean_w, by_step) in zip(BATCHES, taken, strict=True)
    ]
    probe = Probe(
        models.manifest.digest,
        RUNTIME,
        models.provider,
        tuple(marks),
        first_ns,
        tuple(batches),
        memory.pss,
        memory.peak,
    )
    print(json.dumps(to_plain(probe)))


def _taken(
    models: Models, answer: Answering, fed: list[NDArray[Any]], seconds: float
) -> tuple[bool, float | None, dict[str, array[int]]]:
    """The three graphs one by one and the whole path, in turn, so that what slows one of them slows all."""
    from nmoe_edge.bench.samples import BLOCK_S, settle

    latents = [models.extractor(inputs) for inputs in fed]
    steps: dict[str, Callable[[int], object]] = {
        "extractor": lambda i: models.extractor(fed[i]),
        "gate": lambda i: models.gate(latents[i]),
        "expert": lambda i: models.expert(latents[i]),
        WHOLE: lambda i: answer(fed[i]),
    }
    settled = settle(lambda: _in_turn(steps, len(fed), BLOCK_S)[WHOLE], time.monotonic)
    meter = Meter(time.monotonic_ns())
    taken = _in_turn(steps, len(fed), seconds, meter)
    return settled, meter.mean_w, taken


def _in_turn(
    steps: Mapping[str, Callable[[int], object]], inputs: int, seconds: float, meter: Meter | None = None
) -> dict[str, array[int]]:
    """Each step in turn for so long, at least once: what each call took."""
    from nmoe_edge.bench.samples import MOST_SAMPLES

    clock = time.perf_counter_ns
    taken: dict[str, array[int]] = {name: array("q") for name in steps}
    until = clock() + int(seconds * 1e9)
    for turn in range(MOST_SAMPLES):
        for name, step in steps.items():
            began = clock()
            step(turn % inputs)
            taken[name].append(clock() - began)
        if meter is not None:
            meter.tick(time.monotonic_ns())
        if clock() >= until:
            break
    return taken


def _whole_path(models: Models) -> Answering:
    """A device's whole work on rows that stay at home: graphs, route, exchange, combination."""
    from nmoe_edge.protocol.exchange import Call, Exchange
    from nmoe_edge.protocol.routing import route

    manifest = models.manifest
    own, outputs, routing = manifest.expert, manifest.outputs, manifest.routing

    def answer(rows: NDArray[Any]) -> object:
        latents = models.extractor(rows)
        found = route(models.gate(latents), own, (own,), routing.top_k)
        numbers = iter(range(manifest.experts))
        exchange = Exchange(found, outputs, numbers, deadline=float("inf"), combination=routing.combination)
        for call in exchange.start(0.0):
            if isinstance(call, Call):
                exchange.answered(call.request, own, models.expert(latents), 0.0)
        return exchange.result()

    return answer


if __name__ == "__main__":
    main()
