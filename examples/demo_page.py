"""The demo's figures as one page that opens offline: python examples/demo_page.py MEASUREMENTS.json > report.html

It draws what measurements.json holds, and knows nothing else. Style and charts are those of a run's page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe_train.charts import curves, dots, escaped, figure, heat_map, stacks
from nmoe_train.report import METHODS, document, pictures

TOLD = {key: f"{name}: {what}" for key, (name, what) in METHODS.items()} | {
    "local": "Local only: each device trains its own model and never hears of the others",
    "own_expert": "Own expert alone: trained together, used without a network",
    "networked": "Networked: the gate picks who answers, computed at the desk",
    "fleet": "Networked, measured: what the processes answered over their sockets",
}
"""In the order of the table."""
ORDER = ("local", "own_expert", "networked", "fleet", "fedce", "centralised")
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
    gain = 100 * (iid["networked"] - iid["own_expert"])
    ways, home, kept = measured["ways"], measured["latency_ms"]["home"], measured["kept_local"]
    far = measured["latency_ms"]["peers"]
    memory = [found["pss"] for found in measured["memory_mb"].values()]
    helps = (
        f"is {gain:.1f} points better than each device’s own expert without it"
        if gain >= 1
        else f"is no better than each device’s own expert without it ({gain:+.1f} points): training together was enough"
    )
    lines = [
        f"Of {measured['rows']:,} rows {ways['unanswered'] or 'none'} went unanswered, although"
        f" {_count(measured['deaths'], 'device was', 'devices were')} killed on the way: {ways['neighbour']:,} rows of"
        f" dead devices were answered by a neighbour, {ways['degraded']:,} did without the expert that their gate wanted.",
        f"On everybody’s digits a device that trains alone is right on {_percent(iid['local'])}, the fleet on"
        f" {_percent(iid['fleet'])}, one model that saw all samples in one place on {_percent(iid['centralised'])}."
        f" On their own mix: {_percent(own['local'])}, {_percent(own['fleet'])} and {_percent(own['centralised'])}.",
        f"The network itself {helps}. Of the rows of a device’s own mix {_percent(kept['own'])} stay at home, of balanced"
        f" ones {_percent(kept['iid'])}.",
        f"An answer from home takes {_ms(home['p50'])}, one with a peer {_ms(far['p50'])} (medians; everything on one"
        f" machine, so the air is missing). A device takes {sum(memory) / len(memory):.0f} MB of memory.",
    ]
    return "".join(f"<p>{escaped(line)}</p>" for line in lines)


def _worth(measured: Mapping[str, Any]) -> str:
    accuracy = measured["accuracy"]
    methods = [key for key in ORDER if all(key in accuracy[part] for part in PARTS)]
    rows = [[TOLD[key], *(_percent(accuracy[part][key]) for part in PARTS)] for key in methods]
    told = (
        "Right answers, the mean over all devices. Own mix: test rows distributed like the device’s own training rows,"
        " most of them of one digit. Balanced: the whole test set, asked of every device. All but the measured line also"
        " use the class mix that a device learns, where the recipe says so; the processes were asked both kinds of rows"
        " in one sitting and had that switched off (--no-adapt)."
    )
    every = [share for part in PARTS for shares in measured["devices"][part].values() for share in shares]
    names = {"fleet": "as the fleet answered", "own_expert": "own expert alone"}
    drawn = [
        figure(
            dots,
            {names[key]: shares for key, shares in measured["devices"][part].items()},
            _numbers(len(measured["devices"][part]["fleet"])),
            "device",
            caption=f"Right answers of each device, {name}. A dot above its ring: the network helps that device.",
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
            caption=f"Rows of the {name} test, as the processes answered them: which expert answered how many of a device’s"
            f" rows, in percent. The diagonal stayed at home: {_percent(measured['kept_local'][part])} of all.",
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
            caption="How rows were answered, by the moment at which they were due. Shaded: from the kill until the other"
            " devices ask the dead ones again. By a neighbour: the row’s own device was dead, so its application asked"
            " the next. Degraded: the expert that the gate wanted was dead, and another one stood in.",
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
            caption="How long rows waited for their answer, from the moment at which they were due; each line upwards is"
            " ten times as long. The peak is an application that finds its device dead and waits before it asks another.",
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
        "known_s": "all others ask it again, after that",
        "home_s": "its application asks it again, after that",
        "first_answer_s": "its first answer to another device, after that",
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
        "One row at a time, from the moment at which it was due until its answer is in the application’s hands: CURVE both"
        " ways, extractor, gate, expert. Before the kill and after the return; all processes share this machine’s"
        f" {measured['machine']['cores']} cores."
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
    memory = measured["memory_mb"]
    parts = {
        "its own share (PSS)": [found["pss"] for found in memory.values()],
        "the rest of RSS": [found["rss"] - found["pss"] for found in memory.values()],
    }
    rss, pss = ([found[key] for found in memory.values()] for key in ("rss", "pss"))
    caption = (
        f"Memory of each process when the traffic ended: resident (RSS) {min(rss):.0f} to {max(rss):.0f} MB. Its share (PSS)"
        f" counts pages that several processes have in common, such as libraries, in parts: {min(pss):.0f} to"
        f" {max(pss):.0f} MB. On a board of its own a device takes what RSS says."
    )
    numbers = _numbers(len(memory))
    return pictures([figure(stacks, parts, numbers, "device", "MB", caption=caption)])


def _precision(export: Mapping[str, Any]) -> str:
    rows = []
    for kind, speed in export["speed"].items():
        size, known = export["bytes_float"][f"{kind}.onnx"], isinstance(speed, Mapping)
        cells = [f"{1000 * speed[key]:.0f} µs" for key in ("float_ms", "written_ms")] if known else ["–", "–"]
        faster = f"{speed['times_faster']:.2f} ×" if known else "–"
        smaller = (
            [f"{speed['reduced_bytes'] / 1000:.1f} kB", f"{speed['reduced_bytes'] / size:.2f} ×"]
            if known
            else 2 * ["–"]
        )
        rows.append([kind, f"{size / 1000:.1f} kB", *smaller, *cells, faster, export["is"][kind]])
    head = ["", "float", "int8", "size", "float", "int8", "as fast", "exported as"]
    whole = all(kind == "fp32" for kind in export["is"].values())
    told = (
        "Float against int8, one row on one thread. "
        + (
            "Here int8 gains nothing: networks of this size take microseconds, and rounding to integers and back costs as"
            " much as it saves. So nmoe-export --int8 kept every graph in float, and there is no int8 accuracy to show."
            if whole
            else f"Right answers on {export['measured_samples']} held-out rows, through the device’s own code: float"
            f" {export['accuracy_float']:.1f} %, as exported {export['accuracy_written']:.1f} %."
        )
        + " A graph is exported in integers only when that is faster here and right; on a ResNet18 it is."
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
