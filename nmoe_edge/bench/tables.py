"""A benchmark's record, and two of them side by side, as Markdown. A dash is what is not known.

What is not known at all takes no line and no column; one line names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from nmoe_edge.bench.board import Moment
from nmoe_edge.bench.compare import Comparison
from nmoe_edge.bench.probe import WHOLE
from nmoe_edge.bench.record import Record, Row, Stage
from nmoe_edge.bench.samples import LEAST_SAMPLES, MOST_WARM_S, ROOM, TOO_SPREAD, percentile, spread
from nmoe_edge.common.text import one_line

_MOST_LOAD = 0.5
"""Of one core, before the benchmark itself began."""
_ELSEWHERE = 0.05
_MOST_NAMES = 3
"""In a note."""
CALM = "let the machine idle, set the governor to performance, or give it a longer --duration"


def record_tables(record: Record) -> str:
    """All of a record."""
    local = [row for row in record.rows if row.scenario in ("start", "local")]
    remote = [row for row in record.rows if row.scenario in ("peer", "fleet")]
    board = record.machine.board or record.machine.cpu or "an unknown board"
    conditions = [(what, *map(_dash, values)) for what, *values in _conditions(record) if any(values)]
    untold = ", ".join(_untold(record))
    blocks = [one_line(f"# {record.bundle.device} on {board}"), *map(one_line, _headline(record))]
    blocks += [_table(("condition", "before", "after"), conditions)]
    blocks += [f"Not told by this board: {untold}."] if untold else []
    blocks += ["Milliseconds since a process began (medians of its rounds; files are in the page cache):"]
    blocks += [_stages(record, lambda stage: _ms(median(stage.at_ns)))]
    blocks += ["Resident memory after each, MiB:", _stages(record, lambda stage: _mib(stage.rss), memory=True)]
    blocks += [f"Latency, ms. {_caption(record)}", _latencies(local)]
    if remote:
        blocks += [f"Over the wire, ms and bytes a row. {_caption(record)}", _latencies(remote), _wire(remote)]
    notes = [one_line(f"- {note}") for note in (*_elsewhere(record), *doubts(record, record.rows), *_limits(record))]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _headline(record: Record) -> Iterator[str]:
    """What most people want to know: of everything the first that was measured."""
    first: dict[str, Row] = {}
    for row in record.rows:
        if row.scenario != "local" or row.what == WHOLE:
            first.setdefault(row.scenario, row)
    parts = []
    for scenario, where in (
        ("local", "at home, the whole path"),
        ("peer", "to a peer's expert and back"),
        ("fleet", "through the fleet"),
    ):
        if scenario in first:
            row = first[scenario]
            told = row.what if scenario == "fleet" else row.setting
            parts.append(f"{_ms(median(row.samples))} ms {where} ({told})")
    yield f"p50 of one row: {'; '.join(parts)}."
    start = record.starts[0]
    stages = {stage.name: stage for stage in start.stages}
    ready_s, steady = median(stages["ready"].at_ns) / 1e9, _mib(stages["steady"].rss)
    yield f"Models ready {ready_s:.2f} s after a process began; {steady} MiB when steady, no sockets ({start.setting})."


def doubts(record: Record, rows: Sequence[Row]) -> Iterator[str]:
    """Why the figures of these rows should not be copied yet, and what to do."""
    if record.stopped is not None:
        yield f"it was {record.stopped}; what is here was whole by then"
    if record.before.load is not None and record.before.load > _MOST_LOAD:
        yield f"the load average was {record.before.load:.2f} before it began: {CALM}"
    if record.before.throttled != record.after.throttled:
        one, other = _dash(record.before.throttled), _dash(record.after.throttled)
        yield f"throttled: {one} before, {other} after; cool the board"
    steady = [row for row in rows if row.scenario != "start"]
    unsettled = [row for row in steady if not row.settled]
    if unsettled:
        what = f"{len(unsettled)} of {len(steady)} rows, such as {unsettled[0].name}"
        yield f"the warm-up never settled within {MOST_WARM_S:.0f} s of {what}: {CALM}"
    apart = sorted((row for row in steady if spread(row.parts) > TOO_SPREAD), key=lambda row: -spread(row.parts))
    if apart:
        most = f"most those of {apart[0].name}, by {spread(apart[0].parts) - 1:.0%}"
        yield f"rounds of {len(apart)} of {len(steady)} rows differ by more than {TOO_SPREAD - 1:.0%}, {most}: {CALM}"
    for row in rows:
        if row.tally is not None and row.tally.unsent:
            yield (
                f"{row.tally.unsent:,} of {row.tally.asked:,} requests of {row.name} could not be sent in time:"
                " that many a second do not get through; take a lower --rate"
            )
    peers = record.peers
    if peers is not None and any(row.scenario == "fleet" for row in rows):
        alive = [count for count in (peers.before, peers.after) if count is not None]
        if min(alive) < peers.known:
            yield f"of {peers.known} peers {peers.before} were alive before, {_dash(peers.after)} after: serve them all"


def _limits(record: Record) -> Iterator[str]:
    """What its figures do not say."""
    for row in record.rows:
        if row.scenario == "fleet" and row.tally is not None and row.tally.rows:
            if row.tally.at_home == row.tally.rows and (record.peers is None or record.peers.known):
                yield (
                    f"no row of {row.name} left the device: it says nothing of peers; serve with --local-first 1,"
                    " or measure a peer with --at"
                )
            elif row.tally.at_home == 0:
                yield f"no row of {row.name} was answered at home: every one left the device or was degraded"
    if any(len(row.samples) < max(LEAST_SAMPLES.values()) for row in record.rows if row.scenario != "start"):
        least = ", ".join(f"p{share * 100:g} {count:,}" for share, count in LEAST_SAMPLES.items() if count > 1)
        yield f"a percentile that is a dash or left out had too few samples ({least}): give it a longer --duration"


def _elsewhere(record: Record) -> Iterator[str]:
    """What of the whole path is in none of the graphs."""
    groups: dict[tuple[str, int], dict[str, float]] = {}
    for row in record.rows:
        if row.scenario == "local":
            groups.setdefault((row.setting, row.rows), {})[row.what] = median(row.samples)
    for (setting, rows), steps in groups.items():
        whole = steps.pop(WHOLE, None)
        if whole is None:
            continue
        elsewhere, path = (
            whole - sum(steps.values()),
            f"the whole path, {setting}, {rows} row{'s' if rows > 1 else ''},",
        )
        if elsewhere > _ELSEWHERE * whole:
            where = "are in none of the graphs but in route, exchange and combination"
            yield f"of {path} {_ms(elsewhere)} ms, {elsewhere / whole:.0%}, {where}"
        elif -elsewhere > _ELSEWHERE * whole:
            yield f"{path} takes {_ms(-elsewhere)} ms less than its graphs one by one: these samples are noise"


def comparison_tables(old: Record, new: Record, comparison: Comparison) -> str:
    """What became of everything that both have."""
    blocks = [one_line(f"WARNING: another {what} in the second: {a} → {b}") for what, a, b in _differences(old, new)]
    times = [(a.name, _ms(median(a.samples)), _ms(median(b.samples)), it) for a, b, it in comparison.times]
    memory = [(it.name, _mib(it.before), _mib(it.after), became) for it, became in comparison.memory]
    for what, lines in (("p50 ms", times), ("MiB", memory)):
        if lines:
            heads = ("", f"{what} before", "after", "ratio", "99 % interval", "verdict")
            cells = [(*figures, f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.verdict) for *figures, c in lines]
            blocks.append(_table(heads, cells))
    blocks += map(one_line, comparison.answers)
    found: list[str] = []
    verdicts = [it.verdict for *_, it in times + memory]
    if "cannot tell" in verdicts:
        found.append(
            f"- {verdicts.count('cannot tell')} of {len(verdicts)} rows cannot be told: their intervals reach beyond"
            f" 1/{ROOM:.2f} to {ROOM:.2f}; take more --rounds, a longer --duration, an idle machine"
        )
    if "too few rounds" in verdicts:
        found.append(
            f"- {verdicts.count('too few rounds')} of {len(verdicts)} rows have too few rounds: five in each will do"
        )
    for which, one, other, rows in (
        ("first", old, new, [a for a, _, _ in comparison.times]),
        ("second", new, old, [b for _, b, _ in comparison.times]),
    ):
        there = {row.name for row in other.rows}
        alone = [row.name for row in one.rows if row.name not in there]
        if alone:
            more = f"; and {len(alone) - _MOST_NAMES} more" if len(alone) > _MOST_NAMES else ""
            found.append(f"- only in the {which}: {'; '.join(alone[:_MOST_NAMES])}{more}")
        found += [f"- in the {which}, {doubt}" for doubt in doubts(one, rows)] if rows else []
    return "\n\n".join([*blocks, *(["\n".join(map(one_line, found))] if found else [])])


def _differences(old: Record, new: Record) -> Iterator[tuple[str, str, str]]:
    def machine(record: Record) -> str:
        it = record.machine
        return f"{_dash(it.board)}, {_dash(it.cpu)}, {_dash(it.cores)} cores"

    for what, a, b in (
        ("bundle", old.bundle.digest[:12], new.bundle.digest[:12]),
        ("machine", machine(old), machine(new)),
        ("runtime", f"{old.runtime} {old.provider}", f"{new.runtime} {new.provider}"),
        ("governor", _dash(old.before.governor), _dash(new.before.governor)),
    ):
        if a != b:
            yield what, a, b


def _conditions(record: Record) -> Iterator[tuple[str, str | None, str | None]]:
    """What, before and after; what does not change has no after; None where the board does not tell."""
    machine, bundle = record.machine, record.bundle
    sizes = ", ".join(f"{name} {count:,}" for name, count in bundle.files.items())
    for what, value in (
        ("bundle", f"{bundle.digest[:12]} of {bundle.device}; {bundle.precision}, latents {bundle.latents}"),
        ("bytes on disk", f"{sum(bundle.files.values()):,}: {sizes}"),
        ("board", machine.board),
        ("CPU", machine.cpu),
        ("cores", _told(machine.cores)),
        ("memory", None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("kernel", machine.kernel),
        ("software", f"nmoe {record.nmoe}, Python {record.python}, onnxruntime {record.runtime}, {record.provider}"),
    ):
        yield what, value, ""

    def frequency(moment: Moment) -> str | None:
        told = (moment.mhz, moment.most_mhz) != (None, None)
        return f"{_dash(moment.mhz, '.0f')} of {_dash(moment.most_mhz, '.0f')}" if told else None

    one, other = record.before, record.after
    yield "load average", _told(one.load, ".2f"), _told(other.load, ".2f")
    yield "governor", one.governor, other.governor
    yield "MHz", frequency(one), frequency(other)
    yield "°C", _told(one.temperature_c, ".1f"), _told(other.temperature_c, ".1f")
    yield "throttled", one.throttled, other.throttled
    yield "power from", one.power, other.power
    if record.peers is not None:
        before, after, known = record.peers.before, record.peers.after, record.peers.known
        yield "peers alive", f"{before} of {known}", None if after is None else f"{after} of {known}"
    yield "UTC, seconds", f"{record.began}, {record.duration_s:g} for the graphs and for each row over the wire", ""


def _untold(record: Record) -> Iterator[str]:
    """What has neither a line nor a column."""
    yield from (what for what, *values in _conditions(record) if not any(values))
    for what, told in (
        ("memory of a process", (size for start in record.starts for stage in start.stages for size in stage.rss)),
        ("its peak", (size for start in record.starts for size in start.peak)),
        ("its PSS", (size for start in record.starts for size in start.pss)),
        ("power drawn", (row.mean_w for row in record.rows)),
    ):
        if all(value is None for value in told):
            yield what


def _caption(record: Record) -> str:
    cpu, one, other = record.machine.cpu, record.before, record.after
    parts = (
        cpu,
        record.machine.cores and f"{record.machine.cores} cores",
        one.governor and f"governor {one.governor}",
        one.load is not None and f"load {one.load:.2f} → {_dash(other.load, '.2f')}",
        one.temperature_c is not None and f"{one.temperature_c:.0f} → {_dash(other.temperature_c, '.0f')} °C",
        f"onnxruntime {record.runtime} {record.provider}",
        f"bundle {record.bundle.digest[:12]}",
    )
    return one_line(", ".join(part for part in parts if part))


def _stages(record: Record, cell: Callable[[Stage], str], memory: bool = False) -> str:
    """A line for each number of threads, a column for each stage."""
    shown = slice(None) if memory else slice(-1)  # when the steady state was over says nothing
    names = [stage.name for stage in record.starts[0].stages[shown]]
    lines = []
    for start in record.starts:
        rest = (_mib(start.peak), _mib(start.pss)) if memory else ()
        lines.append((start.setting, *map(cell, start.stages[shown]), *rest))
    return _table(("", *names, *(("peak", "PSS") if memory else ())), lines)


def _latencies(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        samples = row.samples
        quantiles = [_ms(percentile(samples, share)) for share in LEAST_SAMPLES]
        apart = f"{spread(row.parts) - 1:.1%}" if len(row.parts) > 1 else "–"
        # A row's energy: what the board or its CPU drew meanwhile, for as long as the median call took.
        millijoules = None if row.mean_w is None else row.mean_w * median(samples) / row.rows / 1e6
        energy = (_dash(row.mean_w, ".2f"), _dash(millijoules, ".3f"))
        lines.append((row.what, row.setting, str(row.rows), f"{len(samples):,}", *quantiles, apart, *energy))
    shares = [f"p{share * 100:g}" for share in LEAST_SAMPLES]
    return _table(("", "", "rows", "samples", *shares, "rounds apart", "W", "mJ a row"), lines)


def _wire(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        tally = row.tally
        counts: tuple[str, ...] = ("–",) * 5
        if tally is not None:
            shares = [f"{part / tally.rows:.1%}" if tally.rows else "–" for part in (tally.at_home, tally.degraded)]
            shares = shares if row.scenario == "fleet" else ["–", "–"]
            counts = (f"{tally.asked:,}", *shares, f"{tally.refused:,}", f"{tally.unanswered:,}")
        sent, received = _dash(row.sent_bytes, ".0f"), _dash(row.received_bytes, ".0f")
        lines.append((row.what, row.setting, str(row.rows), sent, received, *counts))
    heads = ("", "", "rows", "bytes there", "bytes back", "asked", "at home", "degraded", "refused", "unanswered")
    return _table(heads, lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns of one width, so that it reads as well on a terminal; one of nothing but dashes is left out."""
    columns = [column for column in zip(heads, *lines, strict=True) if set(column[1:]) != {"–"}]
    cells = [[one_line(cell).replace("|", "/") for cell in line] for line in zip(*columns, strict=True)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(cells[0]))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _dash(value: object, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _told(value: float | None, form: str = "") -> str | None:
    return None if value is None else format(value, form)


def _ms(ns: float | None) -> str:
    """Three digits that count, and no exponent."""
    if ns is None:
        return "–"
    ms = ns / 1e6
    if 0 < abs(ms) < 0.1:
        return f"{ms:.{2 - math.floor(math.log10(abs(ms)))}f}"
    return f"{ms:.3f}" if abs(ms) < 10 else f"{ms:.1f}"


def _mib(sizes: Sequence[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{median(known) / 2**20:.1f}" if known and len(known) == len(sizes) else "–"
