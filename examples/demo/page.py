"""The page of a demo, from its measurements: python examples/demo/page.py MEASUREMENTS.json > report.html

This module turns the measurements into figures and table rows; page.html holds the text around them. Style and charts
are those of a run's page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nmoe_train.results.pages.charts import Figure, curves, dots, figure, heat_map, stacks
from nmoe_train.results.pages.formats import MISSING, count, microseconds, milliseconds, percent, ratio, seconds, size
from nmoe_train.results.pages.render import render

TEMPLATE = Path(__file__).with_name("page.html")
METHODS = {
    "local": ("Trained alone", "each device learns only from its own images"),
    "own_expert": ("Own expert alone", "trained with the others, used without the network"),
    "networked": ("Networked", "the gate chooses which expert answers"),
    "fedce": ("One shared model", "the classifier that the clients train together first"),
    "centralised": ("Centralised", "trained on all images in one place"),
    "alone": ("Own expert alone, measured", "the exported models, without the network"),
    "fleet": ("Networked, measured", "the answers of the running devices"),
}
"""Name and explanation of each method. The training computes the first five; the last two are measured later."""
PARTS = {"own": "own distribution", "iid": "balanced"}
PHASES = {"before": "before", "dead": "while dead", "after": "after"}
WAYS = {
    "home": ("locally", "the device’s own expert answered"),
    "peers": ("with a peer", "an expert on another device answered"),
    "degraded": ("degraded", "answered without the expert that the gate chose"),
    "neighbour": ("redirected", "the client’s own device was dead, so it asked another"),
    "unanswered": ("unanswered", "no device replied"),
}
DEATH = {
    "noticed_s": ("noticed", "time from the kill until all other devices know that it is gone"),
    "late_rows": ("delayed requests", "its client waited in vain, then asked another device"),
    "longest_s": ("longest delay", "of these requests"),
    "neighbour_rows": ("redirected requests", "its client asked another device, with or without delay"),
    "ready_s": ("ready again", "time from the restart until it accepts requests"),
    "known_s": ("in use again", "time from the restart until all other devices may ask it"),
    "home_s": ("answers its client", "time from the restart to the first answer for its own client"),
    "away_s": ("answers a peer", "time from the restart to the first answer for another device"),
}

Rows = list[list[Any]]
"""Cells of a table; the first is a name, or a name and an explanation."""


def page(measured: Mapping[str, Any]) -> str:
    """The whole page."""
    settings = measured["settings"]
    machine = measured["machine"]
    accuracy = measured["accuracy"]
    export = measured["export"]
    memory = measured["memory_mib"].values()
    return render(
        TEMPLATE,
        title=f"{settings['devices']} small devices, one network",
        measured=measured,
        facts=[
            ("devices", settings["devices"]),
            ("training recipe", settings["recipe"]),
            ("requests", count(measured["rows"])),
            ("machine", f"{machine['cores']} cores, {machine['cpu']}"),
            ("Python", machine["python"]),
        ],
        killed=len(measured["deaths"]),
        gain={part: f"{100 * (accuracy[part]['fleet'] - accuracy[part]['alone']):+.1f}" for part in PARTS},
        little_gain=accuracy["iid"]["fleet"] - accuracy["iid"]["alone"] < 0.01,
        rss=f"{mean(process['rss'] for process in memory):.0f}",
        pss=f"{mean(process['pss'] for process in memory):.0f}",
        parts=list(PARTS.values()),
        methods=_methods(accuracy),
        accuracy_figures=_accuracy_figures(measured["devices"]),
        routing_figures=_routing_figures(measured),
        timeline_figures=[_answers_figure(measured), _waiting_figure(measured)],
        phase_names=list(PHASES.values()),
        phases=_phases(measured["phases"]),
        deaths=_deaths(measured["deaths"]),
        latency=_latency(measured["latency_ms"]),
        latency_figure=_latency_figure(measured["latency_curve"]),
        memory_figure=_memory_figure(measured["memory_mib"]),
        precision=_precision(export),
        all_float=all(kind == "fp32" for kind in export["is"].values()),
        steps=[[command, seconds(took, 1)] for command, took in measured["steps"].items()],
    )


def _methods(accuracy: Mapping[str, Any]) -> Rows:
    rows = []
    for method, name in METHODS.items():
        if all(method in accuracy[part] for part in PARTS):
            rows.append([name, *(percent(accuracy[part][method]) for part in PARTS)])
    return rows


def _accuracy_figures(devices: Mapping[str, Any]) -> list[Figure]:
    every = [share for part in PARTS for shares in devices[part].values() for share in shares]
    span = min(every), max(every)
    figures = []
    for part, name in PARTS.items():
        series = {"networked": devices[part]["fleet"], "own expert alone": devices[part]["alone"]}
        numbers = _numbers(len(devices[part]["fleet"]))
        caption = f"Right answers of each running device, {name}. A dot above its ring: the network helps this device."
        figures.append(figure(dots, series, numbers, "device", caption=caption, span=span))
    return figures


def _routing_figures(measured: Mapping[str, Any]) -> list[Figure]:
    numbers = _numbers(measured["settings"]["devices"])
    figures = []
    for part, name in PARTS.items():
        caption = (
            f"Percentage of each device’s images that each expert answered, {name}. Each row is a device, each column"
            f" an expert. The diagonal, {percent(measured['kept_local'][part])} of all images, was answered locally."
        )
        figures.append(figure(heat_map, measured["routing"][part], numbers, numbers, caption=caption))
    return figures


def _answers_figure(measured: Mapping[str, Any]) -> Figure:
    timeline = measured["timeline"]
    moments = measured["moments"]
    wide = timeline["wide_s"]
    series = {}
    for way, amounts in timeline["ways"].items():
        if way != "unanswered" or any(amounts):
            series[WAYS[way][0]] = amounts
    return figure(
        stacks,
        series,
        [_second(position * wide, wide) for position in range(len(timeline["p50_ms"]))],
        "seconds",
        f"requests in {wide:g} s",
        caption="How requests were answered, by the time at which they were scheduled. Shaded: from the kill until all"
        " other devices use the dead ones again. Redirected: the client’s own device was dead, so the client asked"
        " another one. Degraded: the expert that the gate chose was dead, and another expert answered instead.",
        # A bar stands in the middle of its stretch.
        bands={"dead": (moments["killed"] / wide - 0.5, moments["back"] / wide - 0.5)},
    )


def _waiting_figure(measured: Mapping[str, Any]) -> Figure:
    timeline = measured["timeline"]
    moments = measured["moments"]
    times = [position * timeline["wide_s"] for position in range(len(timeline["p50_ms"]))]
    series = {
        "slowest": list(zip(times, timeline["max_ms"], strict=True)),
        "median": list(zip(times, timeline["p50_ms"], strict=True)),
    }
    return figure(
        curves,
        series,
        "seconds",
        "milliseconds",
        caption="How long requests took, by the time at which they were scheduled. Each line upwards is ten times as"
        " long. The peak: clients wait for a dead device before they ask another one.",
        log=True,
        bands={"dead": (moments["killed"], moments["back"])},
    )


def _second(time: float, wide: float) -> str:
    """A label of the time axis; whole seconds without a decimal."""
    whole = abs(time - round(time)) < wide / 2
    return f"{time:.0f}" if whole else f"{time:.1f}"


def _phases(phases: Mapping[str, Any]) -> Rows:
    """Duration, counts, accuracy and latency; a column for each phase."""
    columns = [phases[name] for name in PHASES]
    times = [column["seconds"] for column in columns]
    rows: Rows = [
        ["seconds", *(f"{end - start:.1f}" for start, end in times)],
        ["requests", *(count(column["rows"]) for column in columns)],
    ]
    for way, name in WAYS.items():
        rows.append([name, *(count(column["ways"][way]) for column in columns)])
    for part, name in PARTS.items():
        rows.append([f"right answers, {name}", *(percent(column["right"][part]) for column in columns)])
    for key, name in (("p50", "median time"), ("p99", "99 of 100 within"), ("max", "slowest")):
        rows.append([name, *(milliseconds(column["latency_ms"][key]) for column in columns)])
    return rows


def _deaths(deaths: Mapping[str, Any]) -> Rows:
    """Times and counts; a column for each device that was killed."""
    rows = []
    for key, name in DEATH.items():
        write = seconds if key.endswith("_s") else count
        rows.append([name, *(write(death[key]) for death in deaths.values())])
    return rows


def _latency(latency_ms: Mapping[str, Any]) -> Rows:
    rows = []
    for way, found in latency_ms.items():
        times = [milliseconds(found[key]) for key in ("p50", "p90", "p99", "max")]
        rows.append([WAYS[way], count(found["rows"]), *times])
    return rows


def _latency_figure(latency_curve: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    series = {WAYS[way][0]: points for way, points in latency_curve.items() if points}
    caption = (
        "Percentage of requests that are answered within a time. Further left is faster. The slowest hundredth is left"
        " out."
    )
    return figure(curves, series, "milliseconds", "percent", caption=caption)


def _memory_figure(memory_mib: Mapping[str, Mapping[str, float]]) -> Figure:
    rss = [process["rss"] for process in memory_mib.values()]
    pss = [process["pss"] for process in memory_mib.values()]
    series = {
        "its share (PSS)": pss,
        "counted for other processes": [whole - share for whole, share in zip(rss, pss, strict=True)],
    }
    caption = (
        f"Memory of each device’s process at the end. The whole bar, {min(rss):.0f} to {max(rss):.0f} MiB, is what a"
        f" board of its own needs (RSS). On one machine, processes share libraries and other pages: with these divided"
        f" among the processes, each uses {min(pss):.0f} to {max(pss):.0f} MiB (PSS)."
    )
    return figure(stacks, series, _numbers(len(memory_mib)), "device", "MiB", caption=caption)


def _precision(export: Mapping[str, Any]) -> Rows:
    """Float against int8, size and time; a row for each kind of model."""
    rows = []
    for kind, speed in export["speed"].items():
        float_size = export["bytes_float"][f"{kind}.onnx"]
        if isinstance(speed, Mapping):
            reduced = speed["reduced_bytes"]
            sizes = [size(reduced), ratio(float_size / reduced)]
            times = [microseconds(speed["float_ms"]), microseconds(speed["written_ms"]), ratio(speed["times_faster"])]
        else:
            sizes = [MISSING] * 2
            times = [MISSING] * 3
        rows.append([kind, size(float_size), *sizes, *times, export["is"][kind]])
    return rows


def _numbers(length: int) -> list[str]:
    return [str(number) for number in range(length)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MEASUREMENTS.json")
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_bytes())))
