"""The page of an export: how large and how fast the graphs are, and what lower precision cost.

This module turns report.json into table rows; templates/export.html holds the text around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmoe_train.results.pages.charts import table_bar
from nmoe_train.results.pages.formats import MISSING, count, decimals, percent, ratio
from nmoe_train.results.pages.render import render

TEMPLATE = Path(__file__).with_name("templates") / "export.html"
COMPONENTS = ("extractor", "gate", "expert")

Rows = list[list[str]]


def page(report: Mapping[str, Any]) -> str:
    """The whole page. Sections about lower precision are left out where the export did not lower it."""
    precision = report.get("precision")
    data: dict[str, Any] = {"report": report, "precision": precision, "graphs": _graphs(report)}
    if precision != "fp32":
        data["experts"] = _experts(report["load"])
    if precision == "int8":
        data["nodes"] = _nodes(report)
        data["operators"] = _operators(report["fusion"])
    return render(TEMPLATE, title="Export report", **data)


def _graphs(report: Mapping[str, Any]) -> Rows:
    """Name, precision, milliseconds in float and as exported, speed-up, bytes in float and as exported."""
    rows = []
    for name in COMPONENTS:
        speed = report.get("speed", {}).get(name)
        if isinstance(speed, Mapping):
            timing = [decimals(speed["float_ms"], 3), decimals(speed["written_ms"], 3), ratio(speed["times_faster"])]
        else:
            timing = [MISSING, MISSING, "not measured" if speed else MISSING]
        sizes = [count(report[key][f"{name}.onnx"]) for key in ("bytes_float", "bytes")]
        rows.append([name, report["is"][name], *timing, *sizes])
    return rows


def _experts(load: Mapping[str, Any]) -> Rows:
    """Number of the expert, its share of the samples in float and as exported, and the latter as a bar."""
    largest = max(load["written"])
    rows = []
    for expert, (in_float, exported) in enumerate(zip(load["float"], load["written"], strict=True)):
        rows.append([str(expert), percent(in_float), percent(exported), table_bar(exported, largest)])
    return rows


def _nodes(report: Mapping[str, Any]) -> Rows:
    """Node of the extractor, signal to noise in decibels, what became of it, and a bar; the noisiest node first."""
    snr_db = report["signal_to_noise_db"]
    reverted = {entry["node"]: entry["drop"] for entry in report["reverted"]}
    largest = max(snr_db.values(), default=0)
    rows = []
    for node, decibels in sorted(snr_db.items(), key=lambda item: item[1]):
        if node in reverted:
            outcome = f"back to float, which left {reverted[node]:.2f} points lost"
        elif node in report["tried_again"]:
            outcome = "int8 again: float brought no gain"
        else:
            outcome = "int8"
        rows.append([node, f"{decibels:.1f} dB", outcome, table_bar(decibels, largest)])
    return rows


def _operators(fusion: Mapping[str, Any]) -> Rows:
    """Operators that onnxruntime executes, the most frequent first; empty where that was not measured."""
    if "unmeasured" in fusion:
        return []
    rows = [
        ["convolutions", f"{fusion['convs_integer']} of {fusion['convs']} integer"],
        ["residual additions", f"{fusion['adds_integer']} of {fusion['adds']} integer"],
        ["nodes that still quantize or dequantize", str(fusion["pairs_left"])],
    ]
    operators = sorted(fusion["operators"].items(), key=lambda item: -item[1])
    return rows + [[kind, str(number)] for kind, number in operators]
