"""A benchmark's record, and two of them side by side, as Markdown. A dash is what is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from nmoe_edge.bench.board import Moment
from nmoe_edge.bench.probe import WHOLE
from nmoe_edge.bench.record import Record, Row, Stage
from nmoe_edge.bench.samples import LEAST_SAMPLES, MOST_WARM_S, TOO_SPREAD, Change, percentile, spread
from nmoe_edge.program import one_line

_MOST_LOAD = 0.5
"""Of one core, before the benchmark itself began."""
_ELSEWHERE = 0.05
CALM = "let the machine idle, set the governor to performance, or give it a longer --duration"


def record_tables(record: Record) -> str:
    """All of a record."""
    local = [row for row in record.rows if row.scenario in ("start", "local")]
    remote = [row for row in record.rows if row.scenario in ("peer", "fleet")]
    board = record.machine.board or record.machine.cpu or "an unknown board"
    blocks = [one_line(f"# {record.bundle.device} on {board}")]
    blocks += [_table(("condition", "before", "after"), _conditions(record))]
    blocks += ["Milliseconds since a process began (medians of its rounds; files are in the page cache):"]
    blocks += [_stages(record, lambda stage: _ms(median(stage.at_ns)))]
    blocks += ["Resident memory after each, MB:", _stages(record, lambda stage: _mb(stage.rss), memory=True)]
    blocks += [f"Latency, ms. {_caption(record)}", _latencies(local)]
    if remote:
        blocks += [f"Over the wire, ms and bytes a row. {_caption(record)}", _latencies(remote), _wire(remote)]
    notes = [one_line(f"- {note}") for note in (*_elsewhere(record), *doubts(record))]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def doubts(record: Record) -> Iterator[str]:
    """Why its figures should not be copied yet, and what to do."""
    if record.before.load is not None and record.before.load > _MOST_LOAD:
        yield f"the load average was {record.before.load:.2f} before it began: {CALM}"
    if record.before.throttled != record.after.throttled:
        one, other = _dash(record.before.throttled), _dash(record.after.throttled)
        yield f"throttled: {one} before, {other} after; cool the board"
    steady = [row for row in record.rows if row.scenario != "start"]
    unsettled = [row for row in steady if not row.settled]
    if unsettled:
        what = f"{len(unsettled)} of {len(steady)} rows, such as {unsettled[0].name}"
        yield f"the warm-up never settled within {MOST_WARM_S:.0f} s of {what}: {CALM}"
    apart = sorted((row for row in steady if spread(row.parts) > TOO_SPREAD), key=lambda row: -spread(row.parts))
    if apart:
        most = f"most those of {apart[0].name}, by {spread(apart[0].parts) - 1:.0%}"
        yield f"rounds of {len(apart)} of {len(steady)} rows differ by more than {TOO_SPREAD - 1:.0%}, {most}: {CALM}"
    if any(len(row.samples) < max(LEAST_SAMPLES.values()) for row in steady):
        least = ", ".join(f"p{share * 100:g} {count:,}" for share, count in LEAST_SAMPLES.items() if count > 1)
        yield f"a percentile with a dash had too few samples ({least}): give it a longer --duration"


def _elsewhere(record: Record) -> Iterator[str]:
    """What of the whole path is in none of the graphs."""
    groups: dict[tuple[str, int], dict[str, float]] = {}
    for row in record.rows:
        if row.scenario == "local":
            groups.setdefault((row.setting, row.rows), {})[row.what] = median(row.samples)
    for (setting, rows), steps in groups.items():
        whole = steps.pop(WHOLE, None)
        if whole is not None and abs(whole - sum(steps.values())) > _ELSEWHERE * whole:
            elsewhere = whole - sum(steps.values())
            yield (
                f"of the whole path, {setting}, {rows} row{'s' if rows > 1 else ''}, {_ms(elsewhere)} ms,"
                f" {elsewhere / whole:.0%}, are in none of the graphs but in route, exchange and combination"
            )


def comparison_tables(old: Record, new: Record, changes: Sequence[tuple[Row, Row, Change]]) -> str:
    """What became of every row that both have."""
    blocks = [one_line(f"WARNING: another {what} in the second: {a} → {b}") for what, a, b in _differences(old, new)]
    found: list[str] = []
    lines = []
    for before, after, it in changes:
        p50 = (_ms(median(before.samples)), _ms(median(after.samples)))
        lines.append((before.name, *p50, f"{it.ratio:.3f}", f"{it.low:.3f} to {it.high:.3f}", it.verdict))
    blocks.append(_table(("", "p50 ms before", "after", "ratio", "99 % interval", "verdict"), lines))
    for which, one, other in (("first", old, new), ("second", new, old)):
        alone = sorted({row.name for row in one.rows} - {row.name for row in other.rows})
        if alone:
            found.append(f"- only in the {which}: {'; '.join(alone)}")
        found += [f"- in the {which}, {doubt}" for doubt in doubts(one)]
    return "\n\n".join([*blocks, "\n".join(map(one_line, found))])


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


def _conditions(record: Record) -> Iterator[tuple[str, str, str]]:
    machine, bundle = record.machine, record.bundle
    memory = None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB"
    sizes = ", ".join(f"{name} {count:,}" for name, count in bundle.files.items())
    for what, value in (
        ("bundle", f"{bundle.digest[:12]} of {bundle.device}; {bundle.precision}, latents {bundle.latents}"),
        ("bytes on disk", f"{sum(bundle.files.values()):,}: {sizes}"),
        ("board", machine.board),
        ("CPU", machine.cpu),
        ("cores, memory", f"{_dash(machine.cores)}, {_dash(memory)}"),
        ("kernel", machine.kernel),
        ("software", f"nmoe {record.nmoe}, Python {record.python}, onnxruntime {record.runtime}, {record.provider}"),
    ):
        yield what, _dash(value), ""

    def frequency(moment: Moment) -> str:
        return f"{_dash(moment.mhz, '.0f')} of {_dash(moment.most_mhz, '.0f')}"

    one, other = record.before, record.after
    yield "load average", _dash(one.load, ".2f"), _dash(other.load, ".2f")
    yield "governor", _dash(one.governor), _dash(other.governor)
    yield "MHz", frequency(one), frequency(other)
    yield "°C", _dash(one.temperature_c, ".1f"), _dash(other.temperature_c, ".1f")
    yield "throttled", _dash(one.throttled), _dash(other.throttled)
    yield "power from", _dash(one.power), _dash(other.power)
    yield "UTC, seconds", f"{record.began}, {record.duration_s:g} for each scenario", ""


def _caption(record: Record) -> str:
    cpu, one, other = record.machine.cpu, record.before, record.after
    return one_line(
        f"{_dash(cpu)}, {_dash(record.machine.cores)} cores, governor {_dash(one.governor)},"
        f" load {_dash(one.load, '.2f')} → {_dash(other.load, '.2f')},"
        f" {_dash(one.temperature_c, '.0f')} → {_dash(other.temperature_c, '.0f')} °C,"
        f" onnxruntime {record.runtime} {record.provider}, bundle {record.bundle.digest[:12]}"
    )


def _stages(record: Record, cell: Callable[[Stage], str], memory: bool = False) -> str:
    """A line for each number of threads, a column for each stage."""
    shown = slice(None) if memory else slice(-1)  # when the steady state was over says nothing
    names = [stage.name for stage in record.starts[0].stages[shown]]
    lines = []
    for start in record.starts:
        rest = (_mb(start.peak), _mb(start.pss)) if memory else ()
        lines.append((start.setting, *map(cell, start.stages[shown]), *rest))
    return _table(("", *names, *(("peak", "PSS") if memory else ())), lines)


def _latencies(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        samples = row.samples
        quantiles = [_ms(percentile(samples, share)) for share in LEAST_SAMPLES]
        apart = f"{spread(row.parts) - 1:.1%}"
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
    """Columns of one width, so that it reads as well on a terminal."""
    cells = [heads, *([one_line(cell).replace("|", "/") for cell in line] for line in lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(heads))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _dash(value: object, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _ms(ns: float | None) -> str:
    """Three digits that count."""
    if ns is None:
        return "–"
    ms = ns / 1e6
    return f"{ms:.3f}" if abs(ms) < 10 else f"{ms:.1f}"


def _mb(sizes: Sequence[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{median(known) / 2**20:.1f}" if known and len(known) == len(sizes) else "–"
