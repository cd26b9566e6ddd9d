"""Ranges and a target -> an int8 graph: static, QDQ, a scale for each channel of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from nmoe_export.calibrate import Range, float_tensors
from nmoe_export.graphs import cleaned
from nmoe_export.targets import Target

COMPUTE = ("Conv", "Gemm", "MatMul", "Add")
OPERATORS = (*COMPUTE, "Relu", "MaxPool", "GlobalAveragePool", "AveragePool", "Reshape", "Flatten")
"""What is made integer; what normalises, and what makes of bytes a picture, stays in float."""


def simplified(graph: bytes) -> onnx.ModelProto:
    """The same graph with constants folded and BatchNorm taken into its Conv."""
    return onnx.load_from_string(optimised(graph, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC))


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, Range], target: Target, floats: Collection[str] = ()
) -> bytes:
    """An int8 graph; the nodes named in `floats`, and those that have no ranges, stay as they are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    activations = QuantType.QUInt8 if target.activations == "uint8" else QuantType.QInt8
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=target.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=activations,
        tensors_range=TensorsData(CalibrationMethod.MinMax, known),
        nodes_to_quantize=[],
        nodes_to_exclude=[*floats, *unranged(model, ranges)],
        op_types_to_quantize=list(OPERATORS),
        extra_options={
            "ActivationSymmetric": target.symmetric,
            "WeightSymmetric": True,
            "QuantizeBias": target.name != "jetson",  # TensorRT wants it in float
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    if target.fuses_conv_with_next:
        _unrounded_inside_fusions(quantizer.model.model.graph)
    return cleaned(_plain(quantizer.model.model))


def quantizable(model: onnx.ModelProto) -> list[str]:
    """The nodes that compute, in their order: those that can go back to float."""
    return [node.name for node in model.graph.node if node.op_type in COMPUTE]


def unranged(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> list[str]:
    """The nodes that touch a tensor without a range, or a weight that is infinite: no integer can say it."""
    inputs = [value.name for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    without = {name for name in (*float_tensors(model), *inputs) if name not in ranges}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
            without.add(tensor.name)
    return [node.name for node in model.graph.node if without.intersection((*node.input, *node.output))]


def _unrounded_inside_fusions(graph: onnx.GraphProto) -> None:
    """Take out the rounding between a Conv and the Relu or Add that it is to be one kernel with.

    Of an Add's two branches only one is fused: the other keeps its rounding.
    """
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    gone: list[onnx.NodeProto] = []
    for node in graph.node:
        for place, name in enumerate(node.input if node.op_type in ("Relu", "Add") else ()):
            back = makers.get(name)
            there = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
            conv = makers.get(there.input[0]) if there is not None and there.op_type == "QuantizeLinear" else None
            if back is None or there is None or conv is None or conv.op_type != "Conv":
                continue
            if all(len(users[output]) == 1 for output in (conv.output[0], there.output[0], back.output[0])):
                node.input[place] = conv.output[0]
                gone += [there, back]
                break
    for node in gone:
        graph.node.remove(node)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the operator sets that the optimizer stamps and nothing uses: older runtimes refuse them."""
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def optimised(graph: bytes, level: onnxruntime.GraphOptimizationLevel) -> bytes:
    """What onnxruntime makes of a graph before it runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()
