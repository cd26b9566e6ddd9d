"""The demo's figures as one page that opens offline: python examples/demo/page.py MEASUREMENTS.json > report.html

It draws what measurements.json holds, and knows nothing else. Style and charts are those of a run's page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe_train.results.pages.charts import curves, dots, escaped, figure, heat_map, stacks
from nmoe_train.results.pages.run_page import METHODS, document, pictures

DESK = {
    "local": ("Local only", "each device trains its own model and never hears of the others"),
    "own_expert": ("Own expert alone", "trained together, used without a network"),
    "networked": ("Networked", "the gate picks who answers"),
    "fedce": METHODS["fedce"],
    "centralised": METHODS["centralised"],
}
MEASURED = {
    "alone": ("Own expert alone, served", "one process, its peers never asked"),
    "fleet": ("Networked, served", "every row sent to its device’s process"),
}
"""Methods in the order of the table: as the training computed them, and as devices answered."""
PARTS = {"own": "own mix", "iid": "balanced"}
WAYS = {
    "home": "at home",
    "peers": "with a peer",
    "degraded": "degraded",
    "neighbour": "by a neighbour",
    "unanswered": "unanswered",
}


def page(measured: Mapping[str, Any]) -> str:
    """The whole page."""
    settings, machine = measured["settings"], measured["machine"]
    facts = {
        "devices": settings["devices"],
        "recipe": settings["recipe"],
        "rows of traffic": f"{measured['rows']:,}",
        "machine": f"{machine['cores']} cores, {machine['cpu']}",
        "Python": machine["python"],
    }
    head = "".join(f"<span>{name} <b>{escaped(value)}</b></span> " for name, value in facts.items())
    failed = "".join(f"<p><b>What did not hold: {escaped(line)}.</b></p>" for line in measured["failed"])
    sections = {
        "In short": _short(measured),
        "What the network is worth": _worth(measured),
        "Who answers whom": _routing(measured),
        f"{_count(measured['deaths'], 'device is', 'devices are')} killed": _deaths(measured),
        "How long an answer takes": _latency(measured),
        "What a device needs": _memory(measured) + _precision(measured["export"]),
        "What was typed": _steps(measured["steps"]),
    }
    body = "".join(f"<section><h2>{escaped(name)}</h2>{text}</section>" for name, text in sections.items())
    return document(f"{settings['devices']} small devices, one network", f'<p class="head">{head}</p>{failed}{body}')


def _short(measured: Mapping[str, Any]) -> str:
    own, iid = (measured["accuracy"][part] for part in PARTS)
    gain, gain_own = (100 * (share["fleet"] - share["alone"]) for share in (iid, own))
    ways, home, far = measured["ways"], *(measured["latency_ms"][way]["p50"] for way in ("home", "peers"))
    rss, pss = ([found[key] for found in measured["memory_mib"].values()] for key in ("rss", "pss"))
    dead = _count(measured["deaths"], "device was", "devices were").lower()
    helps = (
        f"is worth {gain:+.1f} points on balanced rows and {gain_own:+.1f} on a device’s own mix, over its own expert"
        " alone"
    )
    if gain < 1:
        helps += (
            ": next to nothing, since experts that were trained together know everybody’s digits already."
            " With --recipe paper they do not"
        )
    lines = [
        f"Of {measured['rows']:,} rows {ways['unanswered'] or 'none'} went unanswered, although {dead} killed on the"
        f" way: {ways['neighbour']:,} rows of dead devices were answered by a neighbour, {ways['degraded']:,} did"
        " without the expert that their gate wanted.",
        f"On balanced rows a device that trains alone is right on {_percent(iid['local'])}, the fleet on"
        f" {_percent(iid['fleet'])}, one model that was trained with all samples in one place on"
        f" {_percent(iid['centralised'])}. On a device’s own mix: {_percent(own['local'])}, {_percent(own['fleet'])}"
        f" and {_percent(own['centralised'])}.",
        f"Sending rows to each other {helps}. {_percent(measured['kept_local']['own'])} of the rows of a device’s own"
        f" mix stayed at home, {_percent(measured['kept_local']['iid'])} of the balanced ones.",
        f"An answer from home took {_ms(home)}, one with a peer {_ms(far)} (medians, all on one machine: a radio comes"
        f" on top). A device took {_mean(rss):.0f} MiB of memory, {_mean(pss):.0f} MiB where libraries are shared.",
    ]
    return "".join(_say(line) for line in lines)


def _worth(measured: Mapping[str, Any]) -> str:
    accuracy, devices = measured["accuracy"], measured["devices"]
    rows = [
        [": ".join(told), *(_percent(accuracy[part][key]) for part in PARTS)]
        for key, told in (DESK | MEASURED).items()
        if all(key in accuracy[part] for part in PARTS)
    ]
    told = (
        "Right answers, the mean over all devices; higher is better. Own mix: test rows distributed like the device’s"
        " own training rows, most of them of one digit. Balanced: the whole test set, asked of every device. The last"
        " two lines are what devices said; the others were computed where the training was, and use the class mix that"
        " a device learns from its traffic, where the recipe says so. The processes were asked both kinds of rows in"
        " one sitting, and had that switched off (--no-adapt)."
    )
    names = {"fleet": "networked", "alone": "own expert alone"}
    every = [share for part in PARTS for shares in devices[part].values() for share in shares]
    drawn = [
        figure(
            dots,
            {names[key]: devices[part][key] for key in names},
            _numbers(len(devices[part]["fleet"])),
            "device",
            caption=f"Right answers of each device as served, {name} rows. A dot above its ring: the network helps.",
            span=(min(every), max(every)),
        )
        for part, name in PARTS.items()
    ]
    return _table(["", *PARTS.values()], rows) + _say(told) + pictures(drawn)


def _routing(measured: Mapping[str, Any]) -> str:
    numbers = _numbers(measured["settings"]["devices"])
    maps = [
        figure(
            heat_map,
            measured["routing"][part],
            numbers,
            numbers,
            caption=f"Which expert answered how many of a device’s rows, in percent: {name} rows, as the processes"
            f" answered them. The diagonal stayed at home: {_percent(measured['kept_local'][part])} of all.",
        )
        for part, name in PARTS.items()
    ]
    return pictures(maps)


def _deaths(measured: Mapping[str, Any]) -> str:
    times, moments = measured["timeline"], measured["moments"]
    wide, killed, back = times["wide_s"], moments["killed"], moments["back"]
    places = [place * wide for place in range(len(times["p50_ms"]))]
    shown = {WAYS[way]: counts for way, counts in times["ways"].items() if way != "unanswered" or any(counts)}
    drawn = [
        figure(
            stacks,
            shown,
            [f"{place:.0f}" if abs(place - round(place)) < wide / 2 else f"{place:.1f}" for place in places],
            "seconds",
            f"rows in {wide:g} s",
            caption="How rows were answered, by the moment at which they were due. Shaded: from the kill until all"
            " others count the dead as alive again. By a neighbour: the row’s own device was dead, so its application"
            " asked the next. Degraded: the expert that the gate wanted was dead, and another one stood in.",
            bands={"dead": (killed / wide - 0.5, back / wide - 0.5)},
        ),
        figure(
            curves,
            {
                "slowest": list(zip(places, times["max_ms"], strict=True)),
                "median": list(zip(places, times["p50_ms"], strict=True)),
            },
            "seconds",
            "milliseconds",
            caption="How long rows waited for their answer, from the moment at which they were due; each line upwards"
            " is ten times as long. The peak: applications find their device dead, and wait before they ask another.",
            log=True,
            bands={"dead": (killed, back)},
        ),
    ]
    return pictures(drawn) + _phases(measured["phases"]) + _each_death(measured["deaths"])


def _phases(phases: Mapping[str, Any]) -> str:
    columns = {"before": "before", "dead": "while dead", "after": "after"}
    rows: dict[str, list[str]] = {
        "seconds": [f"{end - start:.1f}" for start, end in (phases[name]["seconds"] for name in columns)],
        "rows": [f"{phases[name]['rows']:,}" for name in columns],
    }
    for way, told in WAYS.items():
        rows[f"{told}, rows"] = [f"{phases[name]['ways'][way]:,}" for name in columns]
    for part, told in PARTS.items():
        rows[f"right, {told}"] = [_percent(phases[name]["right"][part]) for name in columns]
    for key, told in {"p50": "median", "p99": "99 in 100 within", "max": "slowest"}.items():
        rows[told] = [_ms(phases[name]["latency_ms"][key]) for name in columns]
    return _table(["", *columns.values()], [[name, *cells] for name, cells in rows.items()])


def _each_death(deaths: Mapping[str, Any]) -> str:
    told = {
        "noticed_s": "all others know that it is gone, after the kill",
        "late_rows": "rows of its application that waited for it",
        "longest_s": "longest of these waits",
        "neighbour_rows": "rows that a neighbour answered for it",
        "ready_s": "its new process serves, after its start",
        "known_s": "all others count on it again, after that start",
        "home_s": "it answers its application again, after that start",
        "away_s": "it answers another device’s row again, after that start",
    }
    rows = [
        [words, *(_seconds(found[key]) if key.endswith("_s") else f"{found[key]:,}" for found in deaths.values())]
        for key, words in told.items()
    ]
    return _table(["", *deaths], rows)


def _latency(measured: Mapping[str, Any]) -> str:
    latency = measured["latency_ms"]
    head = ["", "rows", "median", "90 in 100 within", "99 in 100 within", "slowest"]
    rows = [
        [WAYS[way], f"{found['rows']:,}", *(_ms(found[key]) for key in ("p50", "p90", "p99", "max"))]
        for way, found in latency.items()
    ]
    told = (
        "One row at a time, from the moment at which it was due until the application has its answer: CURVE both ways,"
        " extractor, gate, expert. Before the kill and after the return; all processes and applications share the"
        f" {measured['machine']['cores']} cores of this machine."
    )
    lines = {WAYS[way]: points for way, points in measured["latency_curve"].items() if points}
    chart = figure(
        curves,
        lines,
        "milliseconds",
        "percent of rows",
        caption="How many rows have their answer within so many milliseconds; further left is faster. The slowest"
        " hundredth is left out.",
    )
    return _table(head, rows) + _say(told) + pictures([chart])


def _memory(measured: Mapping[str, Any]) -> str:
    memory = measured["memory_mib"]
    parts = {
        "its own share (PSS)": [found["pss"] for found in memory.values()],
        "the rest of RSS": [found["rss"] - found["pss"] for found in memory.values()],
    }
    rss, pss = ([found[key] for found in memory.values()] for key in ("rss", "pss"))
    caption = (
        f"Memory of each process when the traffic ended: {min(rss):.0f} to {max(rss):.0f} MiB are resident (RSS), which"
        f" is what a board of its own needs. Where pages that several processes have in common, such as libraries, are"
        f" shared out, it is {min(pss):.0f} to {max(pss):.0f} MiB (PSS)."
    )
    numbers = _numbers(len(memory))
    return pictures([figure(stacks, parts, numbers, "device", "MiB", caption=caption)])


def _precision(export: Mapping[str, Any]) -> str:
    rows = []
    for kind, speed in export["speed"].items():
        size, cells = export["bytes_float"][f"{kind}.onnx"], ["–"] * 5
        if isinstance(speed, Mapping):
            cells = [f"{speed['reduced_bytes'] / 1000:.1f} kB", f"{size / speed['reduced_bytes']:.2f} ×"]
            cells += [f"{1000 * speed[key]:.1f} µs" for key in ("float_ms", "written_ms")]
            cells.append(f"{speed['times_faster']:.2f} ×")
        rows.append([kind, f"{size / 1000:.1f} kB", *cells, export["is"][kind]])
    head = ["", "float", "int8", "smaller", "float", "int8", "faster", "exported as"]
    whole = all(kind == "fp32" for kind in export["is"].values())
    told = (
        "Float against int8: bytes on the disk, and one row on one thread. Less than 1 × is slower. "
        + (
            "Networks of this size take microseconds, and rounding to integers and back costs more than it saves: so"
            " nmoe-export --int8 kept every graph in float, and there is no int8 accuracy to show."
            if whole
            else f"Right answers on {export['measured_samples']} held-out rows, through the device’s own code: float"
            f" {export['accuracy_float']:.1f} %, as exported {export['accuracy_written']:.1f} %."
        )
        + " A graph becomes integer only where that is faster and stays right; a ResNet18 shrinks to a quarter."
    )
    return _table(head, rows) + _say(told)


def _steps(steps: Mapping[str, float]) -> str:
    rows = [[command, f"{seconds:.1f} s"] for command, seconds in steps.items()]
    return _table(["command", "took"], [*rows, ["in all", f"{sum(steps.values()):.1f} s"]], "settings")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    lines = [f"<tr>{''.join(f'<th>{escaped(cell)}</th>' for cell in head)}</tr>"]
    for name, *cells in rows:
        told, _, more = name.partition(": ")
        small = f"<small>{escaped(more)}</small>" if more else ""
        lines.append(
            f"<tr><th>{escaped(told)}{small}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>"
        )
    return f'<div class="box"><table class="{kind}">{"".join(lines)}</table></div>'


def _say(text: str) -> str:
    return f"<p>{escaped(text)}</p>"


def _count(things: Mapping[str, Any], one: str, many: str) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five")
    count = words[len(things)] if len(things) < len(words) else str(len(things))
    return f"{count} {one if len(things) == 1 else many}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MEASUREMENTS.json")
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_bytes())))
