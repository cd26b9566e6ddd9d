"""Which operators become integer or float16."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from export.foreign import Attentive, Block
from torch import nn

from nmoe_edge.models import Graph
from nmoe_export.calibrate import Recipe, ranges
from nmoe_export.fp16 import to_float16
from nmoe_export.fusion import fusion
from nmoe_export.graphs import export_graph
from nmoe_export.quantize import nodes_without_range, quantizable, quantize, simplify
from nmoe_export.targets import TARGETS, target_of
from nmoe_train.nets import NetSpec, build


def test_on_a_cpu_every_conv_and_residual_add_is_an_integer_operator(images):
    graph = export_graph(Block().eval(), "block", torch.from_numpy(images[:4]))
    model = simplify(graph)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    for name in ("x86", "pi"):
        found = fusion(quantize(model, ranges(model, images, Recipe()), TARGETS[name]), model, [])
        assert (found.convs, found.convs_integer, found.adds, found.adds_integer) == (2, 2, 1, 1)
        assert not found.operators.keys() & {"Conv", "FusedConv", "Add"}
        assert found.pairs_left == 2  # at the uint8 input and at the float output
        assert not found.missing()


def test_an_int8_graph_is_a_quarter_of_the_size_and_needs_no_extra_operator_set(images):
    wide = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    rows = torch.randn(200, 64)
    graph = export_graph(wide, "wide", rows[:4])
    model = simplify(graph)
    data = quantize(model, ranges(model, rows.numpy(), Recipe()), target_of("x86"))
    assert len(data) < 0.3 * len(graph)
    parsed = onnx.load_from_string(data)
    assert [(opset.domain, opset.version) for opset in parsed.opset_import] == [("", 18)]
    assert parsed.ir_version == 8


def test_named_nodes_stay_in_float(images):
    model = simplify(export_graph(Block().eval(), "block", torch.from_numpy(images[:4])))
    everything = quantizable(model)
    assert len(everything) == 3
    found = ranges(model, images, Recipe())
    assert fusion(quantize(model, found, target_of("x86"), everything), model, everything).convs_integer == 0
    one = fusion(quantize(model, found, target_of("x86"), everything[:1]), model, everything[:1])
    assert (one.convs, one.convs_integer) == (1, 1)
    assert not one.missing()


@pytest.mark.parametrize("name", ["jetson", "x86"])
def test_only_a_jetson_has_no_rounding_between_a_conv_and_the_node_it_fuses_with(name):
    """In a ResNet18 one branch of each residual Add comes straight from its Conv, and the other is rounded."""
    torch.manual_seed(0)
    net = build(NetSpec("resnet18", {"channels": 3, "size": 16, "dim": 32, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16)).astype(np.uint8)
    model = simplify(export_graph(net, "net", torch.from_numpy(images[:4])))
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


def test_missing_integer_operators_are_counted(images):
    """All nodes of the graph are in float although none was expected to be."""
    model = simplify(export_graph(Block().eval(), "block", torch.from_numpy(images[:4])))
    floats = quantize(model, ranges(model, images, Recipe()), target_of("x86"), quantizable(model))
    found = fusion(floats, model, [])
    assert (found.convs, found.convs_integer, found.adds, found.adds_integer) == (2, 0, 1, 0)
    assert found.missing().startswith("2 of 2 convolutions and 1 of 1 residual additions")


def parameters(model, kind):
    """The zero points of activations, or the bias of every Conv."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if kind == "zero points":
        return [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [values.get(node.input[2]) for node in model.graph.node if node.op_type == "Conv"]


def test_each_target_has_its_own_activations_and_biases(images):
    model = simplify(export_graph(Block().eval(), "block", torch.from_numpy(images[:4])))
    made = {
        name: onnx.load_from_string(quantize(model, ranges(model, images, Recipe(), target.symmetric), target))
        for name, target in TARGETS.items()
    }
    for name in ("x86", "pi"):
        points = parameters(made[name], "zero points")
        assert {point.dtype for point in points} == {np.dtype(np.uint8)}
        assert {int(point) for point in points} - {0, 128}  # negative values take a share of the range
        assert parameters(made[name], "biases") == [None, None]  # a node computes it from int32
    points = parameters(made["jetson"], "zero points")
    assert {point.dtype for point in points} == {np.dtype(np.int8)}
    assert not any(points)
    assert [bias.dtype for bias in parameters(made["jetson"], "biases")] == [np.float32] * 2


def test_an_infinite_mask_stays_in_float_and_the_rest_is_quantized():
    torch.manual_seed(0)
    rows = np.random.default_rng(0).normal(size=(80, 4, 6)).astype(np.float32)
    graph = export_graph(Attentive().eval(), "net", torch.from_numpy(rows[:4]))
    model = simplify(graph)
    for method in ("minmax", "mse", "percentile", "entropy"):
        found = ranges(model, rows, Recipe(method=method))
        assert np.isfinite(list(found.values())).all()
        infinite = [node.op_type for node in model.graph.node if node.name in nodes_without_range(model, found)]
        assert "Add" in infinite
        assert infinite.count("MatMul") + infinite.count("Gemm") == 0
        data = quantize(model, found, target_of("x86"))
        known, true = (Graph("net", d, (4, 6), (8,))(rows) for d in (data, graph))
        assert np.abs(known - true).max() < 0.1 * np.abs(true).max()
    parsed = onnx.load_from_string(data)
    makers = {output: node.op_type for node in parsed.graph.node for output in node.output}
    assert "DequantizeLinear" in {
        makers.get(name) for node in parsed.graph.node if node.op_type == "MatMul" for name in node.input
    }


def test_float16_is_half_the_size_and_accurate_and_takes_uint8_inputs(images):
    torch.manual_seed(0)
    net = build(NetSpec("resnet18", {"channels": 3, "size": 8, "dim": 32, "norm": "batch"}))
    graph = export_graph(net, "net", torch.from_numpy(images[:4]))
    data = to_float16(graph)
    assert len(data) < 0.52 * len(graph)
    parsed = onnx.load_from_string(data)
    assert [(opset.domain, opset.version) for opset in parsed.opset_import] == [("", 18)]
    assert parsed.ir_version == 8
    assert parsed.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    kinds = {tensor.name: tensor.data_type for tensor in parsed.graph.initializer}
    weights = {kinds[node.input[1]] for node in parsed.graph.node if node.op_type in ("Conv", "Gemm")}
    assert weights == {onnx.TensorProto.FLOAT16}
    before = [node for node in parsed.graph.node if node.op_type in ("Div", "Sub")]
    assert {kinds[name] for node in before for name in node.input if name in kinds} == {onnx.TensorProto.FLOAT}
    known, true = (Graph("net", d, (3, 8, 8), (32,))(images) for d in (data, graph))
    assert 0 < np.abs(known - true).max() < 1e-2 * np.abs(true).max()
