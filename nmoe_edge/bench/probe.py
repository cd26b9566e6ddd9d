"""A process that measures its own start, memory and answers with a bundle: python -m nmoe_edge.bench.probe

measure.py starts a fresh one for each round, so nothing is loaded or warm. Imports stand inside main, where they are
timed. The probe opens no socket; load.py measures a device that serves.
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
"""Numbers of rows in one call."""
_MAX_INPUTS = 16
"""Inputs of the self-test to use, in a cycle."""
WHOLE = "whole path"
"""The step that includes all graphs, routing, exchange and combination."""
AnswerRows = Callable[["NDArray[Any]"], object]


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a stage: its time and the memory then."""

    stage: str
    at_ns: int
    """Time on the monotonic clock, which all processes of a machine share."""
    rss: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of calls with one number of rows."""

    rows: int
    settled: bool
    mean_w: float | None
    samples: Mapping[str, tuple[int, ...]]
    """Step -> nanoseconds of each call."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything a probe measured, which it prints as JSON."""

    digest: str
    """Digest of the bundle."""
    runtime: str
    provider: str
    marks: tuple[Mark, ...]
    first_ns: int
    """Duration of the first answer."""
    batches: tuple[Batch, ...]
    pss: int | None
    peak: int | None


def main() -> None:
    """Measure a bundle; arguments: BUNDLE THREADS PROVIDER SECONDS.

    Prints a Probe as JSON on stdout, or one line on stderr with exit status 1.
    """
    marks: list[Mark] = []

    def mark(stage: str) -> None:
        now = time.monotonic_ns()
        marks.append(Mark(stage, now, read_memory().rss))

    mark("python")
    if len(sys.argv) != 5:
        sys.exit("usage: python -m nmoe_edge.bench.probe BUNDLE THREADS PROVIDER SECONDS (nmoe-edge bench runs it)")
    folder, threads, provider, seconds = sys.argv[1:]
    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.memory import trim
    from nmoe_edge.common.schema import to_plain
    from nmoe_edge.errors import EdgeError
    from nmoe_edge.models import RUNTIME, Models

    for name in ("bench.samples", "protocol.exchange"):  # or the first answer would include their import
        importlib.import_module(f"nmoe_edge.{name}")
    mark("imports")
    try:
        bundle = read_bundle(folder)
        mark("bundle")
        models = Models(bundle, int(threads), provider, mark)
        inputs = bundle.selftest.inputs[:_MAX_INPUTS]
        del bundle
        # A serving device does the same before it is ready.
        gc.collect()
        gc.freeze()
        trim()
        mark("ready")
        answer = _whole_path(models)
        began = time.perf_counter_ns()
        answer(inputs[:1])
        first_ns = time.perf_counter_ns() - began
        mark("first answer")
        cycled = _cycled(inputs, max(BATCHES))
        timings = []
        for rows in BATCHES:
            calls = [cycled[i : i + rows] for i in range(len(inputs))]
            timings.append(_timing(models, answer, rows, calls, float(seconds) / len(BATCHES)))
        mark("steady")
    except EdgeError as error:
        sys.exit(str(error))
    memory = read_memory()
    probe = Probe(
        models.manifest.digest,
        RUNTIME,
        models.provider,
        tuple(marks),
        first_ns,
        tuple(timing.batch() for timing in timings),
        memory.pss,
        memory.peak,
    )
    print(json.dumps(to_plain(probe)))


def _cycled(inputs: NDArray[Any], rows: int) -> NDArray[Any]:
    """The inputs repeated so that `rows` consecutive ones start at each. inputs: (n, ...) -> (n + rows - 1, ...)

    Every call then gets a view of one array: copies would count as memory that a serving device does not use.
    """
    import numpy as np

    length = len(inputs) + rows - 1
    copies = -(-length // len(inputs))  # rounded up
    return np.concatenate([inputs] * copies)[:length]


@dataclass(frozen=True, slots=True)
class _Timing:
    """A Batch while the probe still measures its memory: arrays take a fifth of what tuples of integers take."""

    rows: int
    settled: bool
    mean_w: float | None
    samples: dict[str, array[int]]

    def batch(self) -> Batch:
        samples = {step: tuple(taken) for step, taken in self.samples.items()}
        return Batch(self.rows, self.settled, self.mean_w, samples)


def _timing(models: Models, answer: AnswerRows, rows: int, calls: list[NDArray[Any]], seconds: float) -> _Timing:
    """Time the three graphs and the whole path, in turn, so that a disturbance slows them all alike.

    calls: the inputs of each call, (rows, ...)
    """
    from nmoe_edge.bench.samples import BLOCK_S, settle

    latents = [models.extractor(inputs) for inputs in calls]
    steps: dict[str, Callable[[int], object]] = {
        "extractor": lambda i: models.extractor(calls[i]),
        "gate": lambda i: models.gate(latents[i]),
        "expert": lambda i: models.expert(latents[i]),
        WHOLE: lambda i: answer(calls[i]),
    }
    settled = settle(lambda: _in_turn(steps, len(calls), BLOCK_S)[WHOLE], time.monotonic)
    meter = Meter(time.monotonic_ns())
    taken = _in_turn(steps, len(calls), seconds, meter)
    return _Timing(rows, settled, meter.mean_w, taken)


def _in_turn(
    steps: Mapping[str, Callable[[int], object]], inputs: int, seconds: float, meter: Meter | None = None
) -> dict[str, array[int]]:
    """Run each step in turn for `seconds`, at least once. Returns step -> nanoseconds of each call."""
    from nmoe_edge.bench.samples import MAX_SAMPLES

    clock = time.perf_counter_ns
    taken: dict[str, array[int]] = {name: array("q") for name in steps}
    until = clock() + int(seconds * 1e9)
    for turn in range(MAX_SAMPLES):
        for name, step in steps.items():
            began = clock()
            step(turn % inputs)
            taken[name].append(clock() - began)
        if meter is not None:
            meter.tick(time.monotonic_ns())
        if clock() >= until:
            break
    return taken


def _whole_path(models: Models) -> AnswerRows:
    """Everything a device does with rows it answers locally: graphs, routing, exchange and combination."""
    from nmoe_edge.protocol.exchange import Call, Exchange
    from nmoe_edge.protocol.routing import route

    manifest = models.manifest
    own = manifest.expert
    routing = manifest.routing

    def answer(rows: NDArray[Any]) -> object:
        latents = models.extractor(rows)
        plan = route(models.gate(latents), own, (own,), routing.top_k)
        numbers = iter(range(manifest.experts))
        exchange = Exchange(plan, manifest.outputs, numbers, deadline=float("inf"), combination=routing.combination)
        for call in exchange.start(0.0):
            if isinstance(call, Call):
                exchange.answered(call.request, own, models.expert(latents), 0.0)
        return exchange.result()

    return answer


if __name__ == "__main__":
    main()
