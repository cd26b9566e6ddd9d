"""Notes under the tables of a benchmark: why a figure may be unreliable, what it does not cover, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from nmoe_edge.bench.cells import dashed, milliseconds
from nmoe_edge.bench.probe import WHOLE
from nmoe_edge.bench.record import Record, Row
from nmoe_edge.bench.samples import MAX_WARM_S, MIN_SAMPLES, TOO_SPREAD, spread
from nmoe_edge.common.text import counted

_MAX_LOAD = 0.5
"""Load average before the benchmark that needs no note, in cores."""
_MIN_OUTSIDE = 0.05
"""Share of the whole path outside the graphs that is worth a note."""
CALM = "let the machine idle, set the governor to performance, or use a longer --duration"


def record_notes(record: Record) -> list[str]:
    """All notes on a record."""
    return [*_outside_the_graphs(record), *doubts(record, record.rows), *_not_covered(record)]


def doubts(record: Record, rows: Sequence[Row]) -> Iterator[str]:
    """Why the figures of these rows may not be reliable, and what to do."""
    yield from _conditions(record)
    steady = [row for row in rows if row.scenario != "start"]
    unsettled = [row for row in steady if not row.settled]
    if unsettled:
        count = f"{len(unsettled)} of {len(steady)} rows, such as {unsettled[0].name}"
        yield f"the warm-up did not settle within {MAX_WARM_S:.0f} s for {count}: {CALM}"
    apart = [row for row in steady if spread(row.parts) > TOO_SPREAD]
    if apart:
        widest = max(apart, key=lambda row: spread(row.parts))
        count = f"{len(apart)} of {len(steady)} rows, most for {widest.name}, by {spread(widest.parts) - 1:.0%}"
        yield f"the rounds differ by more than {TOO_SPREAD - 1:.0%} for {count}: {CALM}"
    for row in rows:
        if row.tally is not None and row.tally.unsent:
            yield (
                f"{row.tally.unsent:,} of {row.tally.asked:,} requests of {row.name} could not be sent in time:"
                " the benchmark or the connection is too slow for this rate; use a lower --rate"
            )
    if record.peers is not None and any(row.scenario == "fleet" for row in rows):
        known = record.peers.known
        before, after = record.peers.before, record.peers.after
        if before < known or (after is not None and after < known):
            yield f"{before} of {known} peers were alive before, {dashed(after)} after: serve all of them"


def _conditions(record: Record) -> Iterator[str]:
    """Conditions of the whole benchmark that make its figures doubtful."""
    if record.stopped is not None:
        yield f"the benchmark was {record.stopped}; the tables hold the complete rounds"
    load = record.before.load
    if load is not None and load > _MAX_LOAD:
        yield f"the load average was {load:.2f} before the benchmark: {CALM}"
    if record.before.throttled != record.after.throttled:
        change = f"{dashed(record.before.throttled)} before, {dashed(record.after.throttled)} after"
        yield f"throttled: {change}; cool the board"


def _not_covered(record: Record) -> Iterator[str]:
    """What the figures say nothing about."""
    for row in record.rows:
        tally = row.tally
        if row.scenario != "fleet" or tally is None or not tally.rows:
            continue
        has_peers = record.peers is None or record.peers.known > 0
        if tally.at_home == tally.rows and has_peers:
            yield (
                f"every row of {row.name} was answered locally, so it says nothing about peers;"
                " serve with --local-first 1, or measure a peer with --at"
            )
        elif tally.at_home == 0:
            yield f"no row of {row.name} was answered locally: each one left the device or was degraded"
    measured = [row for row in record.rows if row.scenario != "start"]
    if any(len(row.samples) < max(MIN_SAMPLES.values()) for row in measured):
        minimum = ", ".join(f"p{share * 100:g} {count:,}" for share, count in MIN_SAMPLES.items() if count > 1)
        yield f"a percentile with a dash or without a column has too few samples ({minimum}): use a longer --duration"


def _outside_the_graphs(record: Record) -> Iterator[str]:
    """How much of the whole path is in none of its graphs."""
    groups: dict[tuple[str, int], dict[str, float]] = {}  # (setting, rows) -> step -> p50
    for row in record.rows:
        if row.scenario == "local":
            groups.setdefault((row.setting, row.rows), {})[row.what] = median(row.samples)
    for (setting, rows), steps in groups.items():
        whole = steps.pop(WHOLE, None)
        if whole is None:
            continue
        outside = whole - sum(steps.values())
        path = f"the whole path, {setting}, {counted(rows, 'row')},"
        if outside > _MIN_OUTSIDE * whole:
            time = f"{milliseconds(outside)} ms, {outside / whole:.0%}"
            yield f"{path} spends {time}, outside the graphs: in routing, exchange and combination"
        elif -outside > _MIN_OUTSIDE * whole:
            yield f"{path} takes {milliseconds(-outside)} ms less than the sum of its graphs: these samples are noise"
