"""The page of an export, from reports of every precision."""

from __future__ import annotations

import copy
import re

import pytest

from nmoe_export.report import page

SECTIONS = {
    "fp32": ["Size and speed"],
    "fp16": ["Size and speed", "Accuracy", "Routing before and after"],
    "int8": [
        *("Size and speed", "Accuracy", "Routing before and after"),
        *("Nodes of the extractor", "Operators of the extractor"),
    ],
}
SPEED = {"float_ms": 0.5, "written_ms": 0.25, "times_faster": 2.0, "reduced_bytes": 250_000}
REPORT = {
    "is": {"extractor": "int8", "gate": "fp32", "expert": "fp32"},
    "bytes_float": {"extractor.onnx": 1_000_000, "gate.onnx": 2000, "expert.onnx": 3000},
    "bytes": {"extractor.onnx": 250_000, "gate.onnx": 2000, "expert.onnx": 3000},
    "speed": {"extractor": SPEED, "gate": "unmeasured"},
    "accuracy_float": 96.0,
    "accuracy_written": 95.5,
    "drop": 0.5,
    "worst": {"device": "device-01", "drop": 1.25},
    "measured_by": "labels",
    "measured_samples": 1280,
    "gate_agreement": 0.995,
    "load": {"float": [0.5, 0.5], "written": [0.25, 0.75]},
    "local_first": {"float": 0.6, "written": 0.7},
    "signal_to_noise_db": {"clean": 40.0, "<noisy>": 12.25, "tried": 20.0},
    "reverted": [{"node": "<noisy>", "drop": 0.3}],
    "tried_again": ["tried"],
    "fusion": {
        "operators": {"Relu": 2, "QLinearConv": 18},
        "convs": 20,
        "convs_integer": 18,
        "adds": 8,
        "adds_integer": 8,
        "pairs_left": 3,
        "missing": "2 of 20 convolutions are not computed in integers",
    },
}


def words(precision, **changes):
    """The page's markup without style and drawings, with a single space between words."""
    text = page({**copy.deepcopy(REPORT), "precision": precision, **changes})
    return " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL).split())


@pytest.mark.parametrize("precision", SECTIONS)
def test_a_page_has_the_sections_of_its_precision(precision):
    assert re.findall("<h2>(.*?)</h2>", words(precision)) == SECTIONS[precision]


def test_graphs_are_listed_with_size_and_speed():
    text = words("int8")
    cells = ["int8", "0.500", "0.250", "2.00 ×", "1,000,000", "250,000"]
    assert "<th>extractor</th>" + "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "<th>gate</th><td>fp32</td><td>–</td><td>–</td><td>not measured</td>" in text
    assert "<th>expert</th><td>fp32</td><td>–</td><td>–</td><td>–</td>" in text


def test_accuracy_is_listed_with_the_worst_device():
    text = words("int8")
    assert "<th>float</th><td>96.00 %</td>" in text
    assert "<th>as exported</th><td>95.50 %</td>" in text
    assert "<th>points lost on the worst device, device-01</th><td>1.25</td>" in text
    assert "1,280 samples" in text
    assert "confidence is above 0.7 (in float: 0.6)" in text


def test_without_labels_and_threshold_the_page_says_so():
    text = words("fp16", measured_by="agreement with float", local_first={"float": 0.6, "written": None})
    assert "<h2>Agreement with float</h2>" in text
    assert "The samples have no labels" in text
    assert "The gate alone decides" in text


def test_nodes_are_listed_from_the_noisiest_with_their_outcome():
    text = words("int8")
    assert re.findall(r"<th>([^<]*)</th><td>[\d.]+ dB</td>", text) == ["&lt;noisy&gt;", "tried", "clean"]
    assert "<td>12.2 dB</td><td>back to float, which left 0.30 points lost</td>" in text
    assert "<td>20.0 dB</td><td>int8 again: float brought no gain</td>" in text
    assert "<td>40.0 dB</td><td>int8</td>" in text


def test_operators_are_listed_or_the_reason_why_not():
    text = words("int8")
    assert "<th>convolutions</th><td>18 of 20 integer</td>" in text
    assert re.findall(r"<th>(\w+)</th><td>\d+</td>", text) == ["QLinearConv", "Relu"]
    assert "2 of 20 convolutions are not computed in integers." in text
    text = words("int8", fusion={"unmeasured": "the extractor stays in float"}, signal_to_noise_db={}, reverted=[])
    assert "Not measured: the extractor stays in float." in text
    assert "Nodes of the extractor" not in text
