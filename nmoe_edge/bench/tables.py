"""Shows a record of the benchmark, or the comparison of two, as Markdown tables with notes.

A line or column of unknown values alone is left out, and one line names what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from statistics import median

from nmoe_edge.bench.board import Moment
from nmoe_edge.bench.cells import DASH, dashed, mebibytes, milliseconds, table
from nmoe_edge.bench.compare import Comparison
from nmoe_edge.bench.notes import doubts, record_notes
from nmoe_edge.bench.probe import WHOLE
from nmoe_edge.bench.record import Record, Row
from nmoe_edge.bench.samples import MIN_SAMPLES, SAME_WITHIN, Change, percentile, spread
from nmoe_edge.common.text import one_line

_MAX_NAMES = 3
"""Rows that a note names; it counts the others."""


def record_tables(record: Record) -> str:
    """The tables and notes of one record."""
    local = [row for row in record.rows if row.scenario in ("start", "local")]
    remote = [row for row in record.rows if row.scenario in ("peer", "fleet")]
    board = record.machine.board or record.machine.cpu or "an unknown board"
    conditions = [(name, dashed(one), dashed(other)) for name, one, other in _conditions(record) if one or other]
    caption = _caption(record)
    blocks = [
        one_line(f"# {record.bundle.device} on {board}"),
        *map(one_line, _headline(record)),
        table(("condition", "before", "after"), conditions),
    ]
    unknown = ", ".join(_unknown(record))
    if unknown:
        blocks.append(f"Not reported by this board: {unknown}.")
    blocks += [
        "Milliseconds from the start of the process to the end of each stage"
        " (median of the rounds; files are in the page cache):",
        _stage_times(record),
        "Resident memory after each stage, MiB:",
        _stage_memory(record),
        f"Latency, ms. {caption}",
        _latencies(local),
    ]
    if remote:
        blocks += [f"Over the wire: latency in ms, bytes per row. {caption}", _latencies(remote), _wire(remote)]
    return _with_notes(blocks, record_notes(record))


def _with_notes(blocks: list[str], notes: list[str]) -> str:
    lines = [one_line(f"- {note}") for note in notes]
    return "\n\n".join([*blocks, "\n".join(lines)] if lines else blocks)


def _headline(record: Record) -> Iterator[str]:
    """The figures that most users look for: the first row of each scenario, start and memory."""
    first: dict[str, Row] = {}
    for row in record.rows:
        if row.scenario != "local" or row.what == WHOLE:
            first.setdefault(row.scenario, row)
    parts = []
    for scenario, path in (
        ("local", "locally, the whole path"),
        ("peer", "to a peer's expert and back"),
        ("fleet", "through the fleet"),
    ):
        if scenario in first:
            row = first[scenario]
            variant = row.what if scenario == "fleet" else row.setting
            parts.append(f"{milliseconds(median(row.samples))} ms {path} ({variant})")
    yield f"p50 of one row: {'; '.join(parts)}."
    start = record.starts[0]
    stages = {stage.name: stage for stage in start.stages}
    ready_s = median(stages["ready"].at_ns) / 1e9
    steady = mebibytes(stages["steady"].rss)
    yield (
        f"Models ready {ready_s:.2f} s after the start of the process;"
        f" {steady} MiB in the steady state, without sockets ({start.setting})."
    )


def _conditions(record: Record) -> Iterator[tuple[str, str | None, str | None]]:
    """Name, value before, value after; None if the board does not report it, and "" after if it cannot change."""
    machine, bundle = record.machine, record.bundle
    sizes = ", ".join(f"{name} {count:,}" for name, count in bundle.files.items())
    memory = None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB"
    for name, value in (
        ("bundle", f"{bundle.digest[:12]} of {bundle.device}; {bundle.precision}, latents {bundle.latents}"),
        ("bytes on disk", f"{sum(bundle.files.values()):,}: {sizes}"),
        ("board", machine.board),
        ("CPU", machine.cpu),
        ("cores", _text(machine.cores)),
        ("memory", memory),
        ("kernel", machine.kernel),
        ("software", f"nmoe {record.nmoe}, Python {record.python}, onnxruntime {record.runtime}, {record.provider}"),
    ):
        yield name, value, ""
    before, after = record.before, record.after
    yield "load average", _text(before.load, ".2f"), _text(after.load, ".2f")
    yield "governor", before.governor, after.governor
    yield "MHz", _frequency(before), _frequency(after)
    yield "°C", _text(before.temperature_c, ".1f"), _text(after.temperature_c, ".1f")
    yield "throttled", before.throttled, after.throttled
    yield "power from", before.power, after.power
    peers = record.peers
    if peers is not None:
        alive_after = None if peers.after is None else f"{peers.after} of {peers.known}"
        yield "peers alive", f"{peers.before} of {peers.known}", alive_after
    yield "start", record.began, ""
    yield "duration", f"{record.duration_s:g} s for each number of threads, and for each row over the wire", ""


def _frequency(moment: Moment) -> str | None:
    if moment.mhz is None and moment.most_mhz is None:
        return None
    return f"{dashed(moment.mhz, '.0f')} of {dashed(moment.most_mhz, '.0f')}"


def _text(value: float | None, form: str = "") -> str | None:
    return None if value is None else format(value, form)


def _unknown(record: Record) -> Iterator[str]:
    """Names of the values without a line or a column, because the board does not report them."""
    for name, before, after in _conditions(record):
        if not before and not after:
            yield name
    stages = chain.from_iterable(start.stages for start in record.starts)
    for name, values in (
        ("memory of a process", chain.from_iterable(stage.rss for stage in stages)),
        ("its peak", chain.from_iterable(start.peak for start in record.starts)),
        ("its PSS", chain.from_iterable(start.pss for start in record.starts)),
        ("power drawn", (row.mean_w for row in record.rows)),
    ):
        if all(value is None for value in values):
            yield name


def _caption(record: Record) -> str:
    """The conditions to copy along with the figures of a table."""
    before, after = record.before, record.after
    parts = [record.machine.cpu]
    if record.machine.cores:
        parts.append(f"{record.machine.cores} cores")
    if before.governor:
        parts.append(f"governor {before.governor}")
    if before.load is not None:
        parts.append(f"load {before.load:.2f} → {dashed(after.load, '.2f')}")
    if before.temperature_c is not None:
        parts.append(f"{before.temperature_c:.0f} → {dashed(after.temperature_c, '.0f')} °C")
    parts.append(f"onnxruntime {record.runtime} {record.provider}")
    parts.append(f"bundle {record.bundle.digest[:12]}")
    return one_line(", ".join(part for part in parts if part))


def _stage_times(record: Record) -> str:
    """A line for each number of threads, a column for each stage but the last: the steady state has no end."""
    names = [stage.name for stage in record.starts[0].stages[:-1]]
    lines = []
    for start in record.starts:
        times = [milliseconds(median(stage.at_ns)) for stage in start.stages[:-1]]
        lines.append([start.setting, *times])
    return table(["", *names], lines)


def _stage_memory(record: Record) -> str:
    """A line for each number of threads, a column for each stage."""
    names = [stage.name for stage in record.starts[0].stages]
    lines = []
    for start in record.starts:
        sizes = [mebibytes(stage.rss) for stage in start.stages]
        lines.append([start.setting, *sizes, mebibytes(start.peak), mebibytes(start.pss)])
    return table(["", *names, "peak", "PSS"], lines)


def _latencies(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        samples = row.samples
        quantiles = [milliseconds(percentile(samples, share)) for share in MIN_SAMPLES]
        apart = f"{spread(row.parts) - 1:.1%}" if len(row.parts) > 1 else DASH
        # Energy per row of input: the mean power of the board or its CPU, for the time of the median call.
        millijoules = None if row.mean_w is None else row.mean_w * median(samples) / row.rows / 1e6
        energy = [dashed(row.mean_w, ".2f"), dashed(millijoules, ".3f")]
        lines.append([row.what, row.setting, str(row.rows), f"{len(samples):,}", *quantiles, apart, *energy])
    shares = [f"p{share * 100:g}" for share in MIN_SAMPLES]
    return table(["", "", "rows", "samples", *shares, "spread of rounds", "W", "mJ per row"], lines)


def _wire(rows: Iterable[Row]) -> str:
    heads = ("", "", "rows", "bytes sent", "bytes received")
    outcomes = ("requests", "answered locally", "degraded", "refused", "unanswered")
    lines = []
    for row in rows:
        size = [dashed(row.sent_bytes, ".0f"), dashed(row.received_bytes, ".0f")]
        lines.append([row.what, row.setting, str(row.rows), *size, *_outcomes(row)])
    return table([*heads, *outcomes], lines)


def _outcomes(row: Row) -> list[str]:
    """The cells of a row's tally. Shares are those of the answered rows, and only of requests through the fleet."""
    tally = row.tally
    if tally is None:
        return [DASH] * 5
    local, degraded = DASH, DASH
    if row.scenario == "fleet" and tally.rows:
        local = f"{tally.at_home / tally.rows:.1%}"
        degraded = f"{tally.degraded / tally.rows:.1%}"
    return [f"{tally.asked:,}", local, degraded, f"{tally.refused:,}", f"{tally.unanswered:,}"]


def comparison_tables(old: Record, new: Record, comparison: Comparison) -> str:
    """The tables and notes of a comparison: times, memory, and rows with fewer answers."""
    blocks = [
        one_line(f"WARNING: the second record has another {name}: {a} → {b}") for name, a, b in _differences(old, new)
    ]
    if comparison.times:
        times = [
            _change_line(a.name, milliseconds(median(a.samples)), milliseconds(median(b.samples)), change)
            for a, b, change in comparison.times
        ]
        blocks.append(_change_table("p50 ms", times))
    if comparison.memory:
        sizes = [
            _change_line(memory.name, mebibytes(memory.before), mebibytes(memory.after), change)
            for memory, change in comparison.memory
        ]
        blocks.append(_change_table("MiB", sizes))
    blocks += map(one_line, comparison.answers)
    notes = [
        *_verdict_notes(comparison),
        *_record_notes("first", old, new, [row for row, _, _ in comparison.times]),
        *_record_notes("second", new, old, [row for _, row, _ in comparison.times]),
    ]
    return _with_notes(blocks, notes)


def _change_table(unit: str, lines: list[list[str]]) -> str:
    return table(("", f"{unit} before", "after", "ratio", "99 % interval", "verdict"), lines)


def _change_line(name: str, before: str, after: str, change: Change) -> list[str]:
    interval = f"{change.low:.3f} to {change.high:.3f}"
    return [name, before, after, f"{change.ratio:.3f}", interval, change.verdict]


def _verdict_notes(comparison: Comparison) -> Iterator[str]:
    """Notes on the rows without a verdict."""
    verdicts = comparison.verdicts
    unclear = verdicts.count("cannot tell")
    if unclear:
        yield (
            f"{unclear} of {len(verdicts)} rows say cannot tell: their intervals are too wide to show a change, or"
            f" to show that there is none (within 1/{SAME_WITHIN:.2f} to {SAME_WITHIN:.2f});"
            " use more --rounds, a longer --duration or an idle machine"
        )
    short = verdicts.count("too few rounds")
    if short:
        yield f"{short} of {len(verdicts)} rows have too few rounds: a verdict needs five in each record"


def _record_notes(which: str, record: Record, other: Record, rows: list[Row]) -> Iterator[str]:
    """Notes on one of two compared records. rows: those of its rows that the comparison shows."""
    others = {row.name for row in other.rows}
    alone = [row.name for row in record.rows if row.name not in others]
    if alone:
        rest = len(alone) - _MAX_NAMES
        more = f"; and {rest} more" if rest > 0 else ""
        yield f"only in the {which} record: {'; '.join(alone[:_MAX_NAMES])}{more}"
    if rows:
        for doubt in doubts(record, rows):
            yield f"in the {which} record, {doubt}"


def _differences(old: Record, new: Record) -> Iterator[tuple[str, str, str]]:
    """Name and both values of each condition that must be equal for a fair comparison, and is not."""
    for name, before, after in (
        ("bundle", old.bundle.digest[:12], new.bundle.digest[:12]),
        ("machine", _machine(old), _machine(new)),
        ("runtime", f"{old.runtime} {old.provider}", f"{new.runtime} {new.provider}"),
        ("governor", dashed(old.before.governor), dashed(new.before.governor)),
    ):
        if before != after:
            yield name, before, after


def _machine(record: Record) -> str:
    machine = record.machine
    return f"{dashed(machine.board)}, {dashed(machine.cpu)}, {dashed(machine.cores)} cores"
