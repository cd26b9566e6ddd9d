"""What an export found, as one page that opens anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nmoe_train.results.pages.charts import escaped
from nmoe_train.results.pages.run_page import document

COMPONENTS = ("extractor", "gate", "expert")
BAR = 160
"""Pixels of the widest bar."""


def page(report: Mapping[str, Any]) -> str:
    """The whole page; sections that were not measured are left out."""
    parts = [_components(report)]
    if report.get("precision") != "fp32":
        parts += [_accuracy(report), _routing(report)]
    if report.get("precision") == "int8":
        parts += [_nodes(report), _fusion(report)]
    return document("What the export found", "".join(parts))


def _components(report: Mapping[str, Any]) -> str:
    rows = []
    for name in COMPONENTS:
        speed = report.get("speed", {}).get(name)
        known = isinstance(speed, Mapping)
        cells = [f"{speed[key]:.3f}" if known else "–" for key in ("float_ms", "written_ms")]
        faster = f"{speed['times_faster']:.2f} ×" if known else "unmeasured" if speed else "–"
        sizes = [f"{report[key][f'{name}.onnx']:,}" for key in ("bytes_float", "bytes")]
        rows.append([name, report["is"][name], *cells, faster, *sizes])
    head = ["", "is", "float, ms", "written, ms", "faster", "float, bytes", "written, bytes"]
    told = "Median of one row on one thread, both precisions taking turns. "
    if report.get("precision") == "int8":
        told += "What is no faster in int8 stays in float."
    if report.get("precision") == "fp16":
        told += (
            "This CPU computes float16 in float32: what it shows is the price of rounded weights, and no gain in speed."
        )
    return _table("Size and speed", head, rows, told)


def _accuracy(report: Mapping[str, Any]) -> str:
    kind = "Right answers" if report["measured_by"] == "labels" else "Answers as float gives them"
    rows = [
        ["float", f"{report['accuracy_float']:.2f} %"],
        ["as written", f"{report['accuracy_written']:.2f} %"],
        ["points lost", f"{report['drop']:.2f}"],
        [f"points lost on the worst, {report['worst']['device']}", f"{report['worst']['drop']:.2f}"],
        ["gates agree", f"{100 * report['gate_agreement']:.2f} %"],
    ]
    first = report["local_first"]
    told = (
        f"Of {report['measured_samples']} samples that had no part in ranges or thresholds, on"
        " every device, through the device's own code. "
        + (
            "The gate alone decides who answers."
            if first["written"] is None
            else f"A row stays at home when its own expert is surer than {first['written']} (float: {first['float']})."
        )
    )
    return _table(kind, ["", "share"], rows, told)


def _routing(report: Mapping[str, Any]) -> str:
    load = report["load"]
    rows = [
        [str(expert), *(f"{100 * share:.1f} %" for share in both), _bar(both[1], max(load["written"]))]
        for expert, both in enumerate(zip(load["float"], load["written"], strict=True))
    ]
    told = "Share of those samples for which the gates prefer each expert, the mean over gates."
    return _table("Routing before and after", ["expert", "float", "as written", ""], rows, told, drawn=3)


def _nodes(report: Mapping[str, Any]) -> str:
    noise, back = report["signal_to_noise_db"], {entry["node"]: entry["drop"] for entry in report["reverted"]}
    if not noise:
        return ""
    rows = [
        [node, f"{db:.1f} dB", _fate(node, back, report["tried_again"]), _bar(db, max(noise.values()))]
        for node, db in sorted(noise.items(), key=lambda item: item[1])
    ]
    told = "How clean the latents stay when this node alone is int8, the noisiest first; those go back to float first."
    return _table("Node by node", ["node", "signal to noise", "is", ""], rows, told, drawn=3)


def _fate(node: str, back: Mapping[str, float], again: Sequence[str]) -> str:
    if node in back:
        return f"back to float: {back[node]:.2f} points lost then"
    return "int8 again: going back helped nothing" if node in again else "int8"


def _fusion(report: Mapping[str, Any]) -> str:
    fusion = report["fusion"]
    if "unmeasured" in fusion:
        return f"<section><h2>Operators</h2><p>Unmeasured: {escaped(fusion['unmeasured'])}.</p></section>"
    rows = [
        ["convolutions", f"{fusion['convs_integer']} of {fusion['convs']} integer"],
        ["residual additions", f"{fusion['adds_integer']} of {fusion['adds']} integer"],
        ["nodes that still round or undo it", str(fusion["pairs_left"])],
    ]
    rows += [[kind, str(count)] for kind, count in sorted(fusion["operators"].items(), key=lambda item: -item[1])]
    told = "What onnxruntime makes of the extractor on this CPU. QLinear operators compute in integers. "
    return _table("Operators", ["operator", "how many"], rows, told + fusion["missing"])


def _bar(value: float, most: float) -> str:
    width = max(1, round(BAR * value / most)) if most > 0 else 1
    return f'<svg width="{BAR}" height="10" role="img"><rect width="{width}" height="10" fill="#2f7ed8"/></svg>'


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], told: str, drawn: int | None = None) -> str:
    """drawn: the column that is markup already"""
    lines = ["".join(f"<th>{escaped(cell)}</th>" for cell in head)]
    for row in rows:
        cells = [cell if i == drawn else escaped(cell) for i, cell in enumerate(row)]
        lines.append(f"<th>{cells[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in cells[1:]))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    box = f'<div class="box"><table>{table}</table></div>'
    return f"<section><h2>{escaped(title)}</h2>{box}<p>{escaped(told)}</p></section>"
