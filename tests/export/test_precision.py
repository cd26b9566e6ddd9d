"""Fleets in int8 and float16: what goes back to float, what is refused, and on whose samples it is judged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from export.foreign import INT8, Attentive, modules
from torch import nn

from nmoe_edge.bundle.fleet import read_fleet_folder
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.models import Models, run_selftest
from nmoe_export import assignment, precision
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import Candidate
from nmoe_export.errors import DropError, GraphError
from nmoe_export.export import Options, export_fleet
from nmoe_export.source import of_modules
from nmoe_export.targets import target_of
from nmoe_train.run import Inference


def test_a_jetson_gets_signed_symmetric_activations_and_small_graphs_in_float16(source, tmp_path):
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, target="jetson"))
    assert done.report["is"] == {"extractor": "int8", "gate": "fp16", "expert": "fp16"}
    assert done.report["speed"]["extractor"] == "unmeasured"
    model = onnx.load(tmp_path / "fleet" / "device-00" / "extractor.onnx")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantized
    for node in quantized:
        assert values[node.input[2]].dtype == np.int8
        assert values[node.input[2]] == 0


def test_a_fleet_of_int8_bundles_passes_its_selftest_and_says_what_it_is(source, tmp_path):
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, latent="int8"))
    assert done.changed
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    for bundle in bundles.values():
        assert run_selftest(Models(bundle), bundle).passed
        assert bundle.manifest.precision.extractor == "int8"
        assert bundle.manifest.latent.dtype == "int8"
        assert bundle.manifest.target == target_of("auto").name
    report = json.loads((tmp_path / "fleet" / "report.json").read_text())
    assert report == done.report
    assert report["accuracy_float"] - report["accuracy_written"] == pytest.approx(report["drop"])
    assert report["gate_agreement"] > 0.8
    assert len(report["signal_to_noise_db"]) == 3
    assert min(report["signal_to_noise_db"].values()) > 10


def test_what_int8_makes_no_faster_stays_in_float(source, tmp_path, monkeypatch):
    monkeypatch.setattr(assignment, "latencies", lambda *_: {"float": 1.0, "written": 1.0})
    said = []
    done = export_fleet(source, tmp_path / "fleet", INT8, said.append)
    assert set(done.report["is"].values()) == {"fp32"}
    assert "extractor stays in float: int8 is 1.00 times as fast here" in said


def test_nodes_go_back_to_float_until_the_drop_is_allowed_the_noisiest_first(source, tmp_path, monkeypatch):
    """As if only the second node's rounding did harm, which no other can make good."""
    noise = {"a": 30.0, "b": 10.0, "c": 20.0}
    monkeypatch.setattr(Candidate, "noise", lambda *_: noise)
    true = precision._worth

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and "c" not in seen[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    seen = [[]]
    best = Candidate.best

    def watched(self):
        if self.name == "extractor":
            seen.append(list(self.floats))
        return best(self)

    monkeypatch.setattr(precision, "_worth", worth)
    monkeypatch.setattr(Candidate, "best", watched)
    said = []
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5), said.append)
    tried = [line.partition(" back")[0] for line in said if " back to float: " in line]
    assert tried == ["expert", "gate", "b", "c"]
    # The first three did no good: they are int8 again.
    assert [entry["node"] for entry in done.report["reverted"]] == ["c"]
    assert done.report["tried_again"] == ["expert", "gate", "b"]
    assert set(done.report["is"].values()) == {"int8"}


def test_the_threshold_is_chosen_again_on_the_int8_system(source, tmp_path, monkeypatch):
    """With clients and a threshold in use: the one that goes into the manifest is the int8 system's own."""
    mine = replace(
        source,
        clients=np.arange(len(source.inputs)) % 3,
        inference=Inference(1, "probabilities", 0.5, False),
        key="mine",
    )
    monkeypatch.setattr(
        precision.Simulation, "threshold", lambda self: replace(self.source.inference, local_first=0.95)
    )
    export_fleet(mine, tmp_path / "fleet", INT8)
    assert read_bundle(tmp_path / "fleet" / "device-01").manifest.routing.local_first == 0.95
    monkeypatch.undo()
    monkeypatch.setattr(assignment, "latencies", lambda *_: {"float": 2.0, "written": 1.0})
    seen = []
    monkeypatch.setattr(
        "nmoe_export.simulation.choose_threshold", lambda own, everybody, rules: seen.append((own, everybody)) or 0.7
    )
    done = export_fleet(mine, tmp_path / "other", INT8)
    assert done.report["local_first"] == {"float": 0.5, "written": 0.7}
    own, everybody = seen[0]
    assert all(np.array_equal(rows.y.numpy(), mine.labels[mine.shown]) for rows in everybody)
    for device, rows in enumerate(own):
        shown = mine.shown[mine.clients[mine.shown] == device]
        assert len(shown) == 13
        assert np.array_equal(rows.y.numpy(), mine.labels[shown])


def test_weights_have_a_scale_for_each_channel(source, tmp_path):
    export_fleet(source, tmp_path / "fleet", INT8)
    model = onnx.load(tmp_path / "fleet" / "device-00" / "extractor.onnx")
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    scales = [
        sizes[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and len(sizes.get(node.input[0], [])) == 4
    ]
    assert scales == [[8], [8]]


def test_modules_that_look_alike_and_answer_otherwise_keep_their_answers(images, tmp_path):
    class Times(nn.Linear):
        def forward(self, h):
            return super().forward(h) * self.factor

    torch.manual_seed(0)
    extractor, gate, _ = modules(experts=2)
    experts = [Times(8, 4), Times(8, 4)]
    experts[0].factor, experts[1].factor = 1.0, 2.0
    export_fleet(of_modules(extractor, gate, experts, images), tmp_path / "fleet")
    bundle = read_bundle(tmp_path / "fleet" / "device-01")
    with torch.no_grad():
        expected = experts[1](torch.from_numpy(np.array(bundle.selftest.latents))).numpy()
    assert np.abs(bundle.selftest.outputs - expected).max() < 1e-4


def test_a_drop_that_cannot_be_held_writes_nothing(source, tmp_path, monkeypatch):
    true = precision._worth
    monkeypatch.setattr(precision, "_worth", lambda s, r, ref, fr: true(s, r, ref, fr) - 50 * (s is not ref))
    with pytest.raises(DropError, match=r"50\.00 points worse than float"):
        export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5))
    assert not list(tmp_path.iterdir())


def test_without_labels_agreement_with_float_is_what_counts(images, tmp_path):
    done = export_fleet(of_modules(*modules(), images), tmp_path / "fleet", INT8)
    assert done.report["measured_by"] == "agreement with float"
    assert done.report["accuracy_float"] == 100.0
    assert not read_bundle(tmp_path / "fleet" / "device-00").manifest.accuracy


def test_an_unchanged_export_does_nothing_and_the_same_export_is_the_same_bytes(source, tmp_path):
    first = export_fleet(source, tmp_path / "fleet", INT8)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fleet").rglob("*")}
    again = export_fleet(source, tmp_path / "fleet", INT8)
    assert not again.changed
    assert again.fleet == first.fleet
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fleet").rglob("*")} == before
    export_fleet(source, tmp_path / "other", INT8)
    for path in (tmp_path / "fleet").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "fleet")).read_bytes()
    (tmp_path / "fleet" / "device-01" / "gate.onnx").write_bytes(b"damaged")
    assert export_fleet(source, tmp_path / "fleet", INT8).changed
    assert export_fleet(source, tmp_path / "fleet", replace(INT8, recipe=Recipe(method="minmax"))).changed


def test_what_devices_have_in_common_is_one_file_and_one_changed_expert_rewrites_one(images, tmp_path):
    extractor, gate, experts = modules()
    float_ = Options()
    export_fleet(of_modules(extractor, gate, experts, images), tmp_path / "fleet", float_)

    def inodes():
        return {str(p.relative_to(tmp_path)): p.stat().st_ino for p in (tmp_path / "fleet").rglob("*.onnx")}

    before = inodes()
    assert len({before[f"fleet/device-0{i}/extractor.onnx"] for i in range(3)}) == 1
    assert len({before[f"fleet/device-0{i}/expert.onnx"] for i in range(3)}) == 3
    with torch.no_grad():
        experts[1][0].weight += 0.1
    export_fleet(of_modules(extractor, gate, experts, images), tmp_path / "fleet", float_)
    after = inodes()
    assert {name for name in before if before[name] != after[name]} == {"fleet/device-01/expert.onnx"}


def test_a_network_of_somebody_else_becomes_a_fleet(tmp_path):
    """torchvision's MobileNet as extractor: depthwise convolutions, hard swishes and all."""
    from nmoe_train.data.vision import models

    torch.manual_seed(0)
    net = models.mobilenet_v3_small(num_classes=16).eval()
    images = np.random.default_rng(1).normal(size=(64, 3, 32, 32)).astype(np.float32)
    fleet = of_modules(net, nn.Linear(16, 2), [nn.Linear(16, 5) for _ in range(2)], images, names=list("abcde"))
    done = export_fleet(fleet, tmp_path / "fleet", INT8)
    found = done.report["fusion"]
    assert found["operators"]["QLinearConv"] == found["convs_integer"] == found["convs"] > 30
    assert found["adds_integer"] == found["adds"] > 0
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    for bundle in bundles.values():
        assert run_selftest(Models(bundle), bundle).passed
        assert bundle.labels == tuple("abcde")


def test_what_is_measured_is_not_what_was_shown(source, tmp_path):
    """Wrong labels on the samples that are shown change no figure; on the others they do."""

    def figures(name, rows):
        labels = source.labels.copy()
        labels[rows] = (labels[rows] + 1) % 4
        done = export_fleet(replace(source, labels=labels, key=name), tmp_path / name, INT8)
        held_out = [read_bundle(tmp_path / name / f"device-0{i}").manifest.accuracy for i in range(3)]
        return [done.report[key] for key in ("accuracy_float", "accuracy_written", "drop", "worst")] + held_out

    true = figures("true", [])
    assert figures("shown", source.shown) == true
    assert figures("measured", source.measured) != true


def test_what_should_be_integer_and_is_not_is_said_and_shown(source, tmp_path, monkeypatch):
    true = precision.fusion
    monkeypatch.setattr(precision, "fusion", lambda *given: replace(true(*given), convs_integer=1, adds_integer=0))
    said = []
    done = export_fleet(source, tmp_path / "fleet", INT8, said.append)
    line = "1 of 2 convolutions and 1 of 1 residual additions of the extractor are not computed in integers"
    assert line in said
    assert done.report["fusion"]["missing"] == line
    page = (tmp_path / "fleet" / "report.html").read_text()
    assert line in page
    assert "1 of 2 integer" in page


def test_nodes_that_went_back_to_float_are_not_missed(source, tmp_path, monkeypatch):
    """As if the first convolution's rounding did harm: it goes back, and the proof speaks of the others."""
    true, first = precision._worth, []

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and not first[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    best = Candidate.best

    def watched(self):
        if self.name == "extractor":
            first.append(self.nodes()[0] in self.floats)
        return best(self)

    monkeypatch.setattr(precision, "_worth", worth)
    monkeypatch.setattr(Candidate, "best", watched)
    found = export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5)).report["fusion"]
    assert (found["convs"], found["convs_integer"], found["adds"], found["missing"]) == (1, 1, 1, "")


def test_the_worst_device_is_named_with_its_drop(source, tmp_path, monkeypatch):
    true = precision._worth

    def worth(system, rules, reference, float_rules):
        return true(reference, float_rules, reference, float_rules) - np.array([1, 7, 1]) * (system is not reference)

    monkeypatch.setattr(precision, "_worth", worth)
    done = export_fleet(source, tmp_path / "fleet", INT8)
    assert done.report["worst"] == {"device": "device-01", "drop": 7.0}
    assert done.report["drop"] == pytest.approx(3)
    assert "device-01" in (tmp_path / "fleet" / "report.html").read_text()


def test_attention_with_a_mask_of_minus_infinity_becomes_an_int8_fleet(tmp_path):
    torch.manual_seed(0)
    rows = np.random.default_rng(0).normal(size=(80, 4, 6)).astype(np.float32)
    fleet = of_modules(Attentive(), nn.Linear(8, 2), [nn.Linear(8, 3) for _ in range(2)], rows)
    done = export_fleet(fleet, tmp_path / "fleet", INT8)
    assert done.report["is"]["extractor"] == "int8"
    assert not done.report["fusion"]["missing"]
    bundle = read_bundle(tmp_path / "fleet" / "device-01")
    assert run_selftest(Models(bundle), bundle).passed
    with torch.no_grad():
        true = fleet.extractor(torch.from_numpy(np.array(bundle.selftest.inputs))).numpy()
    assert np.abs(bundle.selftest.latents - true).max() < 0.1 * np.abs(true).max()


FP16 = Options("fp16", max_drop=100.0)


def test_a_float16_fleet_passes_its_selftest_and_says_what_it_costs(source, tmp_path, monkeypatch):
    # Slower here is no reason to keep float32: it is for other machines.
    monkeypatch.setattr(assignment, "latencies", lambda *_: {"float": 1.0, "written": 2.0})
    done = export_fleet(source, tmp_path / "fleet", FP16)
    assert set(done.report["is"].values()) == {"fp16"}
    assert done.report["speed"]["extractor"]["times_faster"] == 0.5
    assert done.report["speed"]["expert"]["reduced_bytes"] < done.report["bytes_float"]["expert.onnx"]
    assert done.report["bytes"]["expert.onnx"] < done.report["bytes_float"]["expert.onnx"]
    assert done.report["accuracy_float"] - done.report["accuracy_written"] == pytest.approx(done.report["drop"])
    assert done.report["gate_agreement"] > 0.9
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    for bundle in bundles.values():
        assert run_selftest(Models(bundle), bundle).passed
        assert bundle.manifest.precision.gate == "fp16"
        assert bundle.manifest.target == "any"


def test_float16_that_costs_too_much_or_overflows_writes_nothing(source, images, tmp_path, monkeypatch):
    extractor, gate, experts = modules()
    experts[0] = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        for layer, scale in zip(experts[0], (2**12, 2**12, 2**-24), strict=True):
            layer.weight *= scale
    with pytest.raises(GraphError, match="expert 0: numbers inside it go to .*, over the 65504 of float16; "):
        export_fleet(of_modules(extractor, gate, experts, images), tmp_path / "fleet", FP16)
    jetson = export_fleet(
        of_modules(extractor, gate, experts, images), tmp_path / "jetson", replace(INT8, target="jetson")
    )
    assert jetson.report["is"] == {"extractor": "int8", "gate": "fp16", "expert": "fp32"}
    true = precision._worth
    monkeypatch.setattr(precision, "_worth", lambda s, r, ref, fr: true(s, r, ref, fr) - 50 * (s is not ref))
    with pytest.raises(DropError, match=r"float16 is 50\.00 points worse"):
        export_fleet(source, tmp_path / "fleet", replace(FP16, max_drop=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["jetson"]
