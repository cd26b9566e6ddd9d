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

from nmoe_edge.bundle import read_bundle
from nmoe_edge.fleet import read_fleet_folder
from nmoe_edge.models import Graph, Models, run_selftest
from nmoe_edge.protocol.tensor import Tensor
from nmoe_export import choice, precision
from nmoe_export.calibrate import Recipe
from nmoe_export.component import Component
from nmoe_export.errors import DropError, GraphError
from nmoe_export.fleet import Options, export_fleet
from nmoe_export.graphs import export_graph, refilled
from nmoe_export.source import of_modules
from nmoe_export.system import Graphs, System, gate_agreement
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
    monkeypatch.setattr(choice, "latencies", lambda *_: {"float": 1.0, "written": 1.0})
    said = []
    done = export_fleet(source, tmp_path / "fleet", INT8, said.append)
    assert set(done.report["is"].values()) == {"fp32"}
    assert "extractor stays in float: int8 is 1.00 times as fast here" in said


def test_nodes_go_back_to_float_until_the_drop_is_allowed_the_noisiest_first(source, tmp_path, monkeypatch):
    """As if only the second node's rounding did harm, which no other can make good."""
    noise = {"a": 30.0, "b": 10.0, "c": 20.0}
    monkeypatch.setattr(Component, "noise", lambda *_: noise)
    true = precision._worth

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and "c" not in seen[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    seen = [[]]
    best = Component.best

    def watched(self):
        if self.name == "extractor":
            seen.append(list(self.floats))
        return best(self)

    monkeypatch.setattr(precision, "_worth", worth)
    monkeypatch.setattr(Component, "best", watched)
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
    monkeypatch.setattr(precision.System, "threshold", lambda self: replace(self.source.inference, local_first=0.95))
    export_fleet(mine, tmp_path / "fleet", INT8)
    assert read_bundle(tmp_path / "fleet" / "device-01").manifest.routing.local_first == 0.95
    monkeypatch.undo()
    monkeypatch.setattr(choice, "latencies", lambda *_: {"float": 2.0, "written": 1.0})
    seen = []
    monkeypatch.setattr(
        "nmoe_export.system.choose_threshold", lambda own, everybody, rules: seen.append((own, everybody)) or 0.7
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


def test_experts_of_one_build_share_an_exported_graph_with_their_own_weights():
    _, _, experts = modules()
    rows = torch.randn(8, 8)
    first = export_graph(experts[0], "expert 0", rows)
    again = refilled(first, experts[2], "expert 2", rows)
    assert again == export_graph(experts[2], "expert 2", rows)
    assert refilled(first, nn.Linear(8, 4), "other", rows) is None


def test_a_graph_is_measured_as_devices_run_it(source):
    """Float graphs through the system answer what torch answers."""
    rows = torch.from_numpy(source.inputs)
    with torch.no_grad():
        h = source.extractor(rows)
        expected = torch.stack([expert(h) for expert in source.experts], 1)
        asked = source.gates[0](h).argmax(1)
    example = h[:8]
    graphs = Graphs(
        export_graph(source.extractor, "e", rows[:8]),
        [export_graph(source.gates[0], "g", example)],
        [export_graph(expert, "x", example) for expert in source.experts],
    )
    system = System(source, graphs, "float32")
    assert np.abs(system.outputs - expected.numpy()).max() < 1e-4
    answered = expected[torch.arange(len(asked)), asked].argmax(1).numpy()
    assert (system.answered(source.inference)[0] == answered[source.measured]).mean() > 0.97


def test_a_network_of_somebody_else_becomes_a_fleet(tmp_path):
    """torchvision's MobileNet as extractor: depthwise convolutions, hard swishes and all."""
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


@pytest.mark.parametrize("kept", [(), ("extractor",), ("gate",)])
@pytest.mark.parametrize(("gates", "known"), [(1, False), (3, True), (3, False)])
def test_gates_and_experts_are_calibrated_on_what_they_will_receive(images, tmp_path, monkeypatch, kept, gates, known):
    """The latents of the extractor that is written, sent where the gates that are written send them."""
    extractor, gate, experts = modules(gates=gates)
    given = replace(of_modules(extractor, gate, experts, images), clients=np.arange(80) % 3 if known else None)
    saw, true = {}, Component.calibrate

    def calibrate(self, inputs, recipe):
        saw[self.name] = np.array(inputs)
        true(self, inputs, recipe)

    monkeypatch.setattr(Component, "calibrate", calibrate)
    monkeypatch.setattr(choice.Choice, "_faster", lambda self, kind: kind not in kept)
    recipe = Recipe(least=5)
    done = export_fleet(given, tmp_path / "fleet", replace(INT8, recipe=recipe))
    assert [kind for kind, what in done.report["is"].items() if what == "fp32"] == list(kept)
    bundles = [read_bundle(tmp_path / "fleet" / f"device-0{i}").contents for i in range(3)]
    assert np.array_equal(saw["extractor"], images[given.shown])
    latents = Graph("extractor", bundles[0]["extractor.onnx"], (3, 8, 8), (8,))(images[given.shown])
    favourites = np.stack([Graph("gate", b["gate.onnx"], (8,), (3,))(latents).argmax(1) for b in bundles])
    for i in range(3):
        assert np.array_equal(saw[f"gate {i if gates > 1 else 0}"], latents)
        if known:
            owners = given.clients[given.shown]
            sent = (favourites[owners, np.arange(len(owners))] == i) | (owners == i)
        else:
            sent = (favourites == i).any(0)
        assert np.array_equal(saw[f"expert {i}"], latents[sent] if sent.sum() >= 5 else latents), i


def test_gate_and_expert_are_calibrated_on_the_latents_of_somebodys_file(source, images, tmp_path, monkeypatch):
    path = tmp_path / "theirs.npz"
    np.savez(path, inputs=images[::2] // 2)
    saw, true = {}, Component.calibrate

    def calibrate(self, inputs, recipe):
        saw[self.name] = np.array(inputs)
        true(self, inputs, recipe)

    monkeypatch.setattr(Component, "calibrate", calibrate)
    export_fleet(source, tmp_path / "fleet", replace(INT8, recipe=Recipe(data=f"npz:{path}")))
    contents = read_bundle(tmp_path / "fleet" / "device-00").contents
    latents = Graph("extractor", contents["extractor.onnx"], (3, 8, 8), (8,))(images[::2] // 2)
    assert np.array_equal(saw["extractor"], images[::2] // 2)
    assert np.array_equal(saw["gate 0"], latents)
    for i in range(3):
        assert {row.tobytes() for row in saw[f"expert {i}"]} <= {row.tobytes() for row in latents}


@pytest.fixture(scope="module")
def graphs(source):
    """Of the source, in float."""
    rows = torch.from_numpy(source.inputs[:8])
    with torch.no_grad():
        h = source.extractor(rows)
    return Graphs(
        export_graph(source.extractor, "e", rows),
        [export_graph(source.gates[0], "g", h)],
        [export_graph(expert, "x", h) for expert in source.experts],
    )


def test_experts_are_measured_on_latents_as_they_travel_and_gates_on_latents_as_they_are(source, graphs):
    system = System(source, graphs, "int8")
    travelled = np.array(Tensor.pack(system.latents, "int8").unpack())
    assert np.abs(travelled - system.latents).max() > 0
    for i, data in enumerate(graphs.experts):
        assert np.array_equal(system.outputs[:, i], Graph("x", data, (8,), (4,))(travelled))
    assert np.array_equal(system.scores[0], Graph("g", graphs.gates[0], (8,), (3,))(system.latents))


def test_gates_agree_where_their_favourites_are_the_same_on_the_samples_that_measure(source, graphs):
    one, two = System(source, graphs, "float32"), System(source, graphs, "float32")
    assert gate_agreement(one, two) == 1
    others = source.measured[:10]
    two.scores[0][others] = np.roll(one.scores[0][others], 1, axis=1)
    two.scores[0][source.shown] = np.roll(one.scores[0][source.shown], 1, axis=1)
    assert gate_agreement(one, two) == pytest.approx(0.75)
    assert one.load() != two.load()


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

    best = Component.best

    def watched(self):
        if self.name == "extractor":
            first.append(self.nodes()[0] in self.floats)
        return best(self)

    monkeypatch.setattr(precision, "_worth", worth)
    monkeypatch.setattr(Component, "best", watched)
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
    monkeypatch.setattr(choice, "latencies", lambda *_: {"float": 1.0, "written": 2.0})
    done = export_fleet(source, tmp_path / "fleet", FP16)
    assert set(done.report["is"].values()) == {"fp16"}
    assert done.report["speed"]["extractor"]["times_faster"] == 0.5
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
