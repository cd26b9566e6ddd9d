"""The search for int8 and float16: what goes back to float, what is refused, and which samples measure."""

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
from nmoe_edge.protocol.answering import AnswerRules
from nmoe_export import search, speed, trial
from nmoe_export.assignment import Candidates
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import Candidate
from nmoe_export.errors import DropError, GraphError
from nmoe_export.export import Options, export_fleet
from nmoe_export.source import of_modules
from nmoe_export.targets import target_of


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


def test_int8_bundles_pass_their_selftest_and_the_manifest_says_int8(source, tmp_path):
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


def test_a_graph_that_int8_does_not_make_faster_stays_in_float(source, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "latencies", lambda *_: {"float": 1.0, "written": 1.0})
    lines = []
    done = export_fleet(source, tmp_path / "fleet", INT8, lines.append)
    assert set(done.report["is"].values()) == {"fp32"}
    assert "extractor stays in float: int8 is 1.00 times as fast here" in lines


def test_nodes_go_back_to_float_noisiest_first_until_the_drop_is_allowed(source, tmp_path, monkeypatch):
    """Only the rounding of node c costs accuracy here; that of the others costs nothing."""
    snr_db = {"a": 30.0, "b": 10.0, "c": 20.0}
    monkeypatch.setattr(Candidate, "snr_db", lambda *_: snr_db)
    true = trial.percent_right

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and "c" not in seen[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    seen = [[]]
    graphs = Candidates.graphs

    def watched(self, assignment):
        seen.append(assignment.nodes)
        return graphs(self, assignment)

    monkeypatch.setattr(trial, "percent_right", worth)
    monkeypatch.setattr(Candidates, "graphs", watched)
    lines = []
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5), lines.append)
    tried = [line.partition(" back")[0] for line in lines if " back to float: " in line]
    assert tried == ["expert", "gate", "b", "c"]
    # The first three did not help, so they are int8 again.
    assert [entry["node"] for entry in done.report["reverted"]] == ["c"]
    assert done.report["tried_again"] == ["expert", "gate", "b"]
    assert set(done.report["is"].values()) == {"int8"}


def test_the_local_first_threshold_is_chosen_again_for_int8(source, tmp_path, monkeypatch):
    """With clients and a threshold in use, the manifest has the threshold that the int8 graphs choose."""
    with_clients = replace(
        source,
        clients=np.arange(len(source.inputs)) % 3,
        inference=AnswerRules(1, "probabilities", 0.5),
        key="with clients",
    )
    monkeypatch.setattr(trial.Simulation, "threshold", lambda self: replace(self.source.inference, local_first=0.95))
    export_fleet(with_clients, tmp_path / "fleet", INT8)
    assert read_bundle(tmp_path / "fleet" / "device-01").manifest.routing.local_first == 0.95
    monkeypatch.undo()
    monkeypatch.setattr(speed, "latencies", lambda *_: {"float": 2.0, "written": 1.0})
    seen = []
    chooser = "nmoe_export.simulation.choose_local_first"
    monkeypatch.setattr(chooser, lambda own, everything, rules: seen.append((own, everything)) or 0.7)
    done = export_fleet(with_clients, tmp_path / "other", INT8)
    assert done.report["local_first"] == {"float": 0.5, "written": 0.7}
    own, everything = seen[0]
    assert all(np.array_equal(rows.labels, with_clients.labels[with_clients.calibration_rows]) for rows in everything)
    for device, rows in enumerate(own):
        calibrating = with_clients.calibration_rows
        own_rows = calibrating[with_clients.clients[calibrating] == device]
        assert len(own_rows) == 13
        assert np.array_equal(rows.labels, with_clients.labels[own_rows])


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


def test_modules_with_equal_layers_and_different_attributes_keep_their_answers(images, tmp_path):
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


def test_a_fleet_that_loses_too_much_in_int8_is_not_written(source, tmp_path, monkeypatch):
    true = trial.percent_right
    monkeypatch.setattr(trial, "percent_right", lambda s, r, ref, fr: true(s, r, ref, fr) - 50 * (s is not ref))
    with pytest.raises(DropError, match=r"int8 is 50\.00 points worse than float, and --max-drop allows 0\.5"):
        export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5))
    assert not list(tmp_path.iterdir())


def test_without_labels_accuracy_is_agreement_with_float(images, tmp_path):
    done = export_fleet(of_modules(*modules(), images), tmp_path / "fleet", INT8)
    assert done.report["measured_by"] == "agreement with float"
    assert done.report["accuracy_float"] == 100.0
    assert not read_bundle(tmp_path / "fleet" / "device-00").manifest.accuracy


def test_an_up_to_date_export_does_nothing_and_equal_exports_have_equal_bytes(source, tmp_path):
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


def test_equal_files_are_hard_links_and_a_changed_expert_changes_one_file(images, tmp_path):
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


def test_a_torchvision_network_becomes_a_fleet(tmp_path):
    """MobileNet as extractor has depthwise convolutions and hard swishes."""
    from nmoe_train.vision import models

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


def test_accuracy_is_measured_on_samples_that_did_not_calibrate(source, tmp_path):
    """Wrong labels on the calibration half change no figure; on the measured half they do."""

    def figures(name, rows):
        labels = source.labels.copy()
        labels[rows] = (labels[rows] + 1) % 4
        done = export_fleet(replace(source, labels=labels, key=name), tmp_path / name, INT8)
        held_out = [read_bundle(tmp_path / name / f"device-0{i}").manifest.accuracy for i in range(3)]
        return [done.report[key] for key in ("accuracy_float", "accuracy_written", "drop", "worst")] + held_out

    true = figures("true", [])
    assert figures("calibrating", source.calibration_rows) == true
    assert figures("measured", source.measured_rows) != true


def test_missing_integer_operators_are_reported(source, tmp_path, monkeypatch):
    true = search.fusion
    monkeypatch.setattr(search, "fusion", lambda *given: replace(true(*given), convs_integer=1, adds_integer=0))
    lines = []
    done = export_fleet(source, tmp_path / "fleet", INT8, lines.append)
    line = "1 of 2 convolutions and 1 of 1 residual additions of the extractor are not computed in integers"
    assert line in lines
    assert done.report["fusion"]["missing"] == line
    page = (tmp_path / "fleet" / "report.html").read_text()
    assert line in page
    assert "1 of 2 integer" in page


def test_nodes_that_went_back_to_float_are_not_missing_integers(source, tmp_path, monkeypatch):
    """Only the first convolution costs accuracy here: it goes back, and the counts are of the others."""
    true, first = trial.percent_right, []

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and not first[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    graphs = Candidates.graphs

    def watched(self, assignment):
        first.append(self.extractor.nodes()[0] in assignment.nodes)
        return graphs(self, assignment)

    monkeypatch.setattr(trial, "percent_right", worth)
    monkeypatch.setattr(Candidates, "graphs", watched)
    found = export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5)).report["fusion"]
    assert (found["convs"], found["convs_integer"], found["adds"], found["missing"]) == (1, 1, 1, "")


def test_the_worst_device_is_named_with_its_drop(source, tmp_path, monkeypatch):
    true = trial.percent_right

    def worth(system, rules, reference, float_rules):
        return true(reference, float_rules, reference, float_rules) - np.array([1, 7, 1]) * (system is not reference)

    monkeypatch.setattr(trial, "percent_right", worth)
    done = export_fleet(source, tmp_path / "fleet", INT8)
    assert done.report["worst"] == {"device": "device-01", "drop": 7.0}
    assert done.report["drop"] == pytest.approx(3)
    assert "device-01" in (tmp_path / "fleet" / "report.html").read_text()


def test_attention_with_an_infinite_mask_becomes_an_int8_fleet(tmp_path):
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


def test_float16_bundles_pass_their_selftest_and_the_report_has_their_cost(source, tmp_path, monkeypatch):
    # float16 is for other machines, so it is written although it is slower here.
    monkeypatch.setattr(speed, "latencies", lambda *_: {"float": 1.0, "written": 2.0})
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


def test_float16_that_overflows_or_loses_too_much_is_not_written(source, images, tmp_path, monkeypatch):
    extractor, gate, experts = modules()
    experts[0] = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        for layer, scale in zip(experts[0], (2**12, 2**12, 2**-24), strict=True):
            layer.weight *= scale
    with pytest.raises(GraphError, match="expert 0: values inside it reach .*, over the 65504 of float16; "):
        export_fleet(of_modules(extractor, gate, experts, images), tmp_path / "fleet", FP16)
    jetson = export_fleet(
        of_modules(extractor, gate, experts, images), tmp_path / "jetson", replace(INT8, target="jetson")
    )
    assert jetson.report["is"] == {"extractor": "int8", "gate": "fp16", "expert": "fp32"}
    true = trial.percent_right
    monkeypatch.setattr(trial, "percent_right", lambda s, r, ref, fr: true(s, r, ref, fr) - 50 * (s is not ref))
    with pytest.raises(DropError, match=r"float16 is 50\.00 points worse"):
        export_fleet(source, tmp_path / "fleet", replace(FP16, max_drop=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["jetson"]
