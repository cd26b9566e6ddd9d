"""Ranges and a target -> an int8 graph: static quantization in QDQ form, with one scale per channel of the weights."""

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
from nmoe_export.errors import GraphError
from nmoe_export.graphs import clean_model
from nmoe_export.targets import Target

COMPUTE = ("Conv", "Gemm", "MatMul", "Add")
OPERATORS = (*COMPUTE, "Relu", "MaxPool", "GlobalAveragePool", "AveragePool", "Reshape", "Flatten")
"""Operators that become integer. Normalisation, and the scaling of image bytes, stay in float."""


def simplify(graph: bytes) -> onnx.ModelProto:
    """The graph with constants folded and each BatchNorm merged into its Conv."""
    return onnx.load_from_string(optimise(graph, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC))


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, Range], target: Target, float_nodes: Collection[str] = ()
) -> bytes:
    """The int8 graph of `model`. Nodes named in `float_nodes`, and nodes without a range, stay in float."""
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
        nodes_to_exclude=[*float_nodes, *nodes_without_range(model, ranges)],
        op_types_to_quantize=list(OPERATORS),
        extra_options={
            "ActivationSymmetric": target.symmetric,
            "WeightSymmetric": True,
            "QuantizeBias": target.name != "jetson",  # TensorRT wants the bias in float
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    if target.fuses_conv_with_next:
        _drop_rounding_inside_fusions(quantizer.model.model.graph)
    return clean_model(_without_unused_opsets(quantizer.model.model))


def quantizable(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that compute, in graph order. Each of them can stay in float."""
    return [node.name for node in model.graph.node if node.op_type in COMPUTE]


def nodes_without_range(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> list[str]:
    """The nodes that use a tensor without a range, or a weight that is not finite. Integers cannot represent these."""
    inputs = [value.name for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    without = {name for name in (*float_tensors(model), *inputs) if name not in ranges}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
            without.add(tensor.name)
    return [node.name for node in model.graph.node if without.intersection((*node.input, *node.output))]


def _drop_rounding_inside_fusions(graph: onnx.GraphProto) -> None:
    """Remove the rounding between a Conv and the Relu or Add that TensorRT fuses with it.

    Only one of an Add's two branches is fused; the other keeps its rounding.
    """
    makers: dict[str, onnx.NodeProto] = {}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.output:
            makers[name] = node
        for name in node.input:
            users.setdefault(name, []).append(node)
    removed: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in ("Relu", "Add"):
            continue
        for position, name in enumerate(node.input):
            rounding = _rounding_after_conv(name, makers)
            if rounding is None:
                continue
            conv, quantizer, dequantizer = rounding
            outputs = (conv.output[0], quantizer.output[0], dequantizer.output[0])
            if all(len(users[output]) == 1 for output in outputs):
                node.input[position] = conv.output[0]
                removed += [quantizer, dequantizer]
                break
    for node in removed:
        graph.node.remove(node)


def _rounding_after_conv(
    name: str, makers: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto] | None:
    """The Conv, QuantizeLinear and DequantizeLinear that compute the tensor `name`; None when others do."""
    dequantizer = makers.get(name)
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return None
    quantizer = makers.get(dequantizer.input[0])
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return None
    conv = makers.get(quantizer.input[0])
    if conv is None or conv.op_type != "Conv":
        return None
    return conv, quantizer, dequantizer


def _without_unused_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the operator sets that the optimizer declares and no node uses: older runtimes refuse them."""
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def optimise(graph: bytes, level: onnxruntime.GraphOptimizationLevel) -> bytes:
    """The graph as onnxruntime's optimizer rewrites it at this level. GraphError when no temporary file can be used."""
    try:
        return _optimise(graph, level)
    except OSError as error:
        raise GraphError(f"no temporary file: {error.strerror}; set TMPDIR to a folder with room") from error


def _optimise(graph: bytes, level: onnxruntime.GraphOptimizationLevel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 4  # fatal errors only
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()
