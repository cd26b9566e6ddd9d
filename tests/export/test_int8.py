"""int8 fleets: what is made integer, what goes back to float, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nmoe_edge.bundle import read_bundle
from nmoe_edge.fleet import read_fleet_folder
from nmoe_edge.models import Models, run_selftest
from nmoe_export import precision
from nmoe_export.calibrate import Recipe, ranges
from nmoe_export.cli import main
from nmoe_export.errors import DropError, SourceError
from nmoe_export.fleet import Options, export_fleet
from nmoe_export.graphs import export_graph, refilled
from nmoe_export.quantize import fused, quantizable, quantize, simplified
from nmoe_export.source import of_modules
from nmoe_export.system import Graphs, System
from nmoe_export.targets import TARGETS, target_of
from nmoe_train.nets import NetSpec, build
from nmoe_train.run import Inference


class Block(nn.Module):
    """A convolution with BatchNorm, a residual one, and a pool: what a ResNet is made of, in a few kB."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.one(x.float() / 255)).relu()
        return (x + self.two(x)).relu().mean((2, 3))


def modules(seed=0, experts=3):
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(experts)]
    return Block().eval(), nn.Linear(8, experts), nets


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (80, 3, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="module")
def source(images):
    extractor, gate, experts = modules()
    with torch.no_grad():
        h = extractor(torch.from_numpy(images))
        labels = experts[0](h).argmax(1).numpy()
    return of_modules(extractor, gate, experts, images, labels=labels)


@pytest.fixture(autouse=True)
def int8_is_faster(monkeypatch):
    """Whether it is is the machine's business, which no test may depend on; what follows from it is not."""
    monkeypatch.setattr(precision, "latencies", lambda *_: {"float": 2.0, "int8": 1.0})


INT8 = Options("int8", max_drop=100.0)


def test_on_a_cpu_every_conv_and_residual_add_is_an_integer_operator(images):
    graph = export_graph(Block().eval(), "block", torch.from_numpy(images[:4]))
    model = simplified(graph)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    for name in ("x86", "pi"):
        counts = fused(quantize(model, ranges(model, images, Recipe()), TARGETS[name]))
        assert counts["QLinearConv"] == 2
        assert counts["QLinearAdd"] == 1
        assert not counts.keys() & {"Conv", "FusedConv", "Add"}


def test_an_int8_graph_is_a_quarter_and_near_the_float_one_and_plain(images):
    wide = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    rows = torch.randn(200, 64)
    graph = export_graph(wide, "wide", rows[:4])
    model = simplified(graph)
    data = quantize(model, ranges(model, rows.numpy(), Recipe()), target_of("x86"))
    assert len(data) < 0.3 * len(graph)
    parsed = onnx.load_from_string(data)
    assert [(opset.domain, opset.version) for opset in parsed.opset_import] == [("", 18)]
    assert parsed.ir_version == 8


def test_nodes_that_are_named_stay_in_float(images):
    model = simplified(export_graph(Block().eval(), "block", torch.from_numpy(images[:4])))
    everything = quantizable(model)
    assert len(everything) == 3
    found = ranges(model, images, Recipe())
    assert "QLinearConv" not in fused(quantize(model, found, target_of("x86"), everything))
    assert fused(quantize(model, found, target_of("x86"), everything[:1]))["QLinearConv"] == 1


def test_a_jetson_gets_signed_symmetric_activations_and_small_graphs_in_float(source, tmp_path):
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, target="jetson"))
    assert done.report["is"] == {"extractor": "int8", "gate": "fp32", "expert": "fp32"}
    assert done.report["speed"]["extractor"] == "unmeasured"
    model = onnx.load(tmp_path / "fleet" / "device-00" / "extractor.onnx")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantized
    for node in quantized:
        assert values[node.input[2]].dtype == np.int8
        assert values[node.input[2]] == 0


@pytest.mark.parametrize("name", ["jetson", "x86"])
def test_only_a_jetson_has_nothing_rounded_between_a_conv_and_what_it_fuses_with(name):
    """A ResNet18: of the two branches of a residual Add one comes straight from its Conv, the other is rounded."""
    torch.manual_seed(0)
    net = build(NetSpec("resnet18", {"channels": 3, "size": 16, "dim": 32, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16)).astype(np.uint8)
    model = simplified(export_graph(net, "net", torch.from_numpy(images[:4])))
    parsed = onnx.load_from_string(quantize(model, ranges(model, images, Recipe(method="minmax")), TARGETS[name]))
    makers = {output: node for node in parsed.graph.node for output in node.output}
    adds = [node for node in parsed.graph.node if node.op_type == "Add"]
    assert len(adds) == 8
    for add in adds:
        kinds = sorted(makers[name].op_type for name in add.input)
        assert kinds == (["Conv", "DequantizeLinear"] if name == "jetson" else ["DequantizeLinear"] * 2)
    before = [makers[node.input[0]].op_type for node in parsed.graph.node if node.op_type == "Relu"]
    assert set(before) <= {"Conv", "Add", "DequantizeLinear"}
    if name == "jetson":
        assert before.count("Conv") == 9
    onnx.checker.check_model(parsed, full_check=True)


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
    assert report["accuracy_float"] - report["accuracy_int8"] == pytest.approx(report["drop"])
    assert report["gate_agreement"] > 0.8
    assert len(report["signal_to_noise_db"]) == 3
    assert min(report["signal_to_noise_db"].values()) > 10


def test_what_int8_makes_no_faster_stays_in_float(source, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "latencies", lambda *_: {"float": 1.0, "int8": 1.0})
    said = []
    done = export_fleet(source, tmp_path / "fleet", INT8, said.append)
    assert set(done.report["is"].values()) == {"fp32"}
    assert "extractor stays in float: int8 is 1.00 times as fast here" in said


def test_nodes_go_back_to_float_until_the_drop_is_allowed_the_noisiest_first(source, tmp_path, monkeypatch):
    """As if only the second node's rounding did harm, which no other can make good."""
    noise = {"a": 30.0, "b": 10.0, "c": 20.0}
    monkeypatch.setattr(precision._Component, "noise", lambda *_: noise)
    true = precision._worth

    def worth(system, rules, reference, float_rules):
        harmed = system is not reference and not {"a", "b", "c"} <= set(seen[-1]) and "c" not in seen[-1]
        return true(reference, float_rules, reference, float_rules) - 50 * harmed

    seen = [[]]
    best = precision._Component.best

    def watched(self):
        if self.name == "extractor":
            seen.append(list(self.floats))
        return best(self)

    monkeypatch.setattr(precision, "_worth", worth)
    monkeypatch.setattr(precision._Component, "best", watched)
    done = export_fleet(source, tmp_path / "fleet", replace(INT8, max_drop=0.5))
    assert [entry["node"] for entry in done.report["reverted"]] == ["expert", "gate", "b", "c"]


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
    monkeypatch.setattr(precision, "latencies", lambda *_: {"float": 2.0, "int8": 1.0})
    seen = []
    monkeypatch.setattr("nmoe_export.system.choose_threshold", lambda own, everybody, rules: seen.append(own) or 0.7)
    done = export_fleet(mine, tmp_path / "other", INT8)
    assert done.report["local_first"] == {"float": 0.5, "int8": 0.7}
    assert [len(rows.y) for rows in seen[0]] == [27, 27, 26]


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


def test_what_a_module_answers_belongs_to_the_key_and_so_do_names_and_top_k(images):
    class Capped(nn.Linear):
        cap = 1.0

        def forward(self, h):
            return super().forward(h).clamp(max=self.cap)

    torch.manual_seed(0)
    extractor, gate, experts = modules()
    experts[1] = Capped(8, 4)
    first = of_modules(extractor, gate, experts, images).key
    assert of_modules(extractor, gate, experts, images).key == first
    assert of_modules(extractor, gate, experts, images, top_k=2).key != first
    assert of_modules(extractor, gate, experts, images, names=list("abcd")).key != first
    experts[1].cap = -1.0
    assert of_modules(extractor, gate, experts, images).key != first


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
    assert (system.answered(source.inference)[0] == answered).mean() > 0.98


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gate": nn.Linear(8, 2)}, "1 gates with 2 scores do not choose among 3 experts"),
        ({"experts": [nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 5)]}, "all must put out as many"),
        ({"experts": [nn.Linear(9, 4)] * 3}, "expert 0 fails on rows of"),
        ({"calibration": np.zeros((3, 4))}, "calibration is float64"),
        ({"labels": np.zeros(3)}, "labels are float64"),
        ({"labels": np.full(80, 9)}, "labels are not in 0..3"),
        ({"names": ["a"]}, "1 names for 4 outputs"),
        ({"experts": []}, "one of each at least"),
        ({"calibration": [[1.0]]}, "are numpy arrays"),
        ({"extractor": nn.Flatten()}, "the extractor does not make float32 rows"),
    ],
)
def test_modules_that_do_not_fit_are_one_line(images, change, text):
    extractor, gate, experts = modules()
    arguments = {"extractor": extractor, "gate": gate, "experts": experts, "calibration": images, **change}
    with pytest.raises(SourceError, match=text):
        of_modules(**arguments)


def test_a_network_of_somebody_else_becomes_a_fleet(tmp_path):
    """torchvision's MobileNet as extractor: depthwise convolutions, hard swishes and all."""
    from nmoe_train.vision import models

    torch.manual_seed(0)
    net = models.mobilenet_v3_small(num_classes=16).eval()
    images = np.random.default_rng(1).normal(size=(40, 3, 32, 32)).astype(np.float32)
    fleet = of_modules(net, nn.Linear(16, 2), [nn.Linear(16, 5) for _ in range(2)], images, names=list("abcde"))
    done = export_fleet(fleet, tmp_path / "fleet", INT8)
    assert done.report["fusion"]["QLinearConv"] > 30
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    for bundle in bundles.values():
        assert run_selftest(Models(bundle), bundle).passed
        assert bundle.labels == tuple("abcde")


FACTORY = """
import numpy as np
from torch import nn

def fleet():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    return dict(extractor=net, gate=nn.Linear(4, 2), experts=[nn.Linear(4, 3), nn.Linear(4, 3)],
                calibration=np.ones((40, 6), np.float32))

def wrong():
    return dict(extractr=None)
"""


def test_the_command_takes_modules_and_says_what_int8_is_worth(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_fleet.py").write_text(FACTORY)
    shown = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100")
    assert shown.exit_code == 0, shown.error
    assert "bundles/their_fleet: 2 bundles" in shown.output
    assert "2.00 ×" in shown.output
    again = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100", "--json")
    assert set(json.loads(again.output)) >= {"is", "drop", "speed"}
    for arguments, text in (
        (("--modules", "their_fleet:wrong"), "returns no arguments"),
        (("--modules", "nowhere:fleet"), "ModuleNotFoundError"),
        (("--modules", "their_fleet:fleet", "run"), "two sources"),
        (("--modules", "their_fleet:fleet", "--int8", "--target", "watch"), "no target is called 'watch'"),
        (("--modules", "their_fleet:fleet", "--int8", "--calibration", "best"), "there are default"),
        (("--modules", "their_fleet:fleet", "--max-drop", "nan"), "not a number from 0 on"),
    ):
        refused = run_main(main, *arguments)
        assert (refused.exit_code, refused.error.count("\n")) == (1, 1), refused.error
        assert text in refused.error
