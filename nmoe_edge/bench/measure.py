"""Runs a benchmark in rounds: the graphs in fresh processes, then peers and the fleet over the wire.

The differences between rounds show how much of a difference is noise. While the graphs are measured, the benchmark
serves no device.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from nmoe_edge import __version__
from nmoe_edge.bench.board import read_machine, read_moment
from nmoe_edge.bench.plan import SOURCE_ROOT, Plan, Say
from nmoe_edge.bench.probe import BATCHES, Probe
from nmoe_edge.bench.record import SCHEMA, Peers, Record, Row, Stage, Start, Subject
from nmoe_edge.bench.remote import Series, alive_peers, fleet_series, mean_power, peer_series, served_device
from nmoe_edge.bundle.folder import Bundle, read_bundle
from nmoe_edge.common.schema import from_plain, parse_json
from nmoe_edge.common.text import counted
from nmoe_edge.device.membership import find_membership
from nmoe_edge.errors import BenchError, EdgeError

_MAX_PROBE_S = 600.0
"""Longest time for a probe, besides ten times its duration."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One fresh process that measured the graphs."""

    began_ns: int
    """When the process was started, on the monotonic clock."""
    probe: Probe


@dataclass(slots=True)
class _Findings:
    """The complete rounds so far, and what the benchmark does now."""

    local: dict[int, list[_Round]]
    """Number of threads -> rounds."""
    series: list[Series] = field(default_factory=list)
    peers: Peers | None = None
    doing: str = ""


def measure(plan: Plan, say: Say) -> Record:
    """Carry out the plan and return the record. say: prints progress.

    A KeyboardInterrupt or an EdgeError ends it early, with a record of the complete rounds. Before the first complete
    round of every number of threads, it passes through.
    """
    bundle = read_bundle(plan.bundle)
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before = read_moment()
    _check(plan, bundle, say)
    found = _Findings({threads: [] for threads in plan.threads})
    stopped = None
    with contextlib.ExitStack() as stack:
        for target in dict.fromkeys(plan.targets):
            found.series += peer_series(plan, bundle, target, stack)
        if len({series.what for series in found.series}) < len(set(plan.targets)):
            raise BenchError("two of the --at lead to the same device; give it once")
        try:
            _measure_rounds(plan, bundle, found, say, stack)
        except (KeyboardInterrupt, EdgeError) as error:
            if not all(found.local.values()):
                raise
            reason = f": {error}" if isinstance(error, EdgeError) else ""
            stopped = f"stopped in {found.doing}{reason}"
        remote = [series.row() for series in found.series if series.drives]
    local = [row for threads, rounds in found.local.items() for row in _local_rows(threads, rounds)]
    probe = found.local[plan.threads[0]][0].probe
    return Record(
        schema=SCHEMA,
        began=began,
        nmoe=__version__,
        python=platform.python_version(),
        runtime=probe.runtime,
        provider=probe.provider,
        machine=read_machine(),
        before=before,
        after=read_moment(),
        bundle=_subject(bundle),
        duration_s=plan.duration_s,
        starts=tuple(_start(threads, rounds) for threads, rounds in found.local.items()),
        rows=(*local, *remote),
        peers=found.peers,
        stopped=stopped,
    )


def _check(plan: Plan, bundle: Bundle, say: Say) -> None:
    """Raise before the first round what would otherwise fail after minutes."""
    if plan.provider != "auto":
        from nmoe_edge.models import check_installed  # imports onnxruntime, which this process needs for nothing else

        check_installed(plan.provider)
    find_membership(plan.fleet, bundle.manifest, plan.key)
    if plan.fleet is not None:
        with served_device(plan, bundle, plan.fleet, lambda text: say(f"trial: {text}")):
            pass


def _measure_rounds(plan: Plan, bundle: Bundle, found: _Findings, say: Say, stack: contextlib.ExitStack) -> None:
    """Measure every round, and add each to `found` once it is complete."""

    def begin(index: int, what: str) -> None:
        found.doing = f"round {index + 1} of {plan.rounds}: {what}"
        say(found.doing)

    for index in range(plan.rounds):
        for threads, rounds in found.local.items():
            begin(index, f"the graphs, {counted(threads, 'thread')}")
            rounds.append(_probe(plan, threads, bundle.manifest.digest))
    device = None
    if plan.fleet is not None:
        found.doing = "meeting the fleet"
        device = stack.enter_context(served_device(plan, bundle, plan.fleet, say))
        found.peers = Peers(device.peers, device.alive)
        found.series += fleet_series(plan, bundle, device, stack)
    numbers = itertools.count(secrets.randbits(60))
    for index in range(plan.rounds):
        for series in found.series:
            begin(index, series.title)
            series.measure(numbers, plan.round_s)
    if device is not None:
        found.peers = Peers(device.peers, device.alive, alive_peers(device.client.status()))


def _probe(plan: Plan, threads: int, digest: str) -> _Round:
    """Measure the graphs in a fresh process. digest: of the bundle; BenchError if the process finds another one."""
    arguments = [str(plan.bundle.absolute()), str(threads), plan.provider, str(plan.round_s)]
    command = [sys.executable, "-m", "nmoe_edge.bench.probe", *arguments]
    timeout_s = _MAX_PROBE_S + 10 * plan.duration_s
    began_ns = time.monotonic_ns()
    try:
        done = subprocess.run(  # noqa: S603  # our own command
            command, capture_output=True, text=True, cwd=SOURCE_ROOT, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise BenchError(
            f"{plan.bundle}: no result within {timeout_s:.0f} s with {counted(threads, 'thread')}"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
        raise BenchError(f"{counted(threads, 'thread')}: {lines[-1]}")
    probe = from_plain(Probe, parse_json(done.stdout.splitlines()[-1]))  # a GPU's runtime may print before it
    if probe.digest != digest:
        raise BenchError(f"{plan.bundle}: the bundle was replaced during the benchmark; measure again")
    return _Round(began_ns, probe)


def _subject(bundle: Bundle) -> Subject:
    manifest, precision = bundle.manifest, bundle.manifest.precision
    return Subject(
        manifest.device,
        manifest.digest,
        f"extractor {precision.extractor}, gate {precision.gate}, expert {precision.expert}",
        manifest.latent.dtype,
        {name: entry.bytes for name, entry in manifest.files.items()},
    )


def _start(threads: int, rounds: list[_Round]) -> Start:
    """When each stage of the processes was over, and their memory."""
    stages = []
    for i, first in enumerate(rounds[0].probe.marks):
        at_ns = tuple(one.probe.marks[i].at_ns - one.began_ns for one in rounds)
        rss = tuple(one.probe.marks[i].rss for one in rounds)
        stages.append(Stage(first.stage, at_ns, rss))
    return Start(
        counted(threads, "thread"),
        tuple(stages),
        pss=tuple(one.probe.pss for one in rounds),
        peak=tuple(one.probe.peak for one in rounds),
    )


def _local_rows(threads: int, rounds: list[_Round]) -> Iterator[Row]:
    """The rows of the record that need no network."""
    setting = counted(threads, "thread")
    yield Row("start", "process to sessions open", setting, 1, tuple((_sessions_open_ns(one),) for one in rounds))
    yield Row("start", "first answer", setting, 1, tuple((one.probe.first_ns,) for one in rounds))
    for i, rows in enumerate(BATCHES):
        batches = [one.probe.batches[i] for one in rounds]
        settled = all(batch.settled for batch in batches)
        mean_w = mean_power([batch.mean_w for batch in batches])
        for step in batches[0].samples:
            parts = tuple(batch.samples[step] for batch in batches)
            yield Row("local", step, setting, rows, parts, settled, mean_w)


def _sessions_open_ns(one: _Round) -> int:
    """From the start of the process to the last open session, which is the expert's."""
    return next(mark.at_ns for mark in one.probe.marks if mark.stage == "expert") - one.began_ns
