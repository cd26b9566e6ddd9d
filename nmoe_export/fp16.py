"""A float graph -> the same graph in float16: half the bytes, and the fastest type on GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from nmoe_export.graphs import clean_model

HEAVY = ("Conv", "Gemm", "MatMul", "Gather")
"""Operators that multiply by weights or look them up."""
WIDE = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "LogSoftmax")
"""Operators that stay in float32: squares and powers overflow float16 early, and onnxruntime 1.15 cannot run them in
float16 on a CPU."""


def to_float16(graph: bytes) -> bytes:
    """The graph in float16, with the inputs as they were and a float32 output.

    The nodes before the first weights, which scale the bytes of an image, stay in float32.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    front = _before_weights(model.graph)
    half = _convert(_without(model, front))
    _replace(half.graph.input, model.graph.input)
    _replace(half.graph.value_info, [])
    _append(half.graph, front, model.graph.initializer)
    whole = ONNXModel(half)
    whole.topological_sort()
    whole.clean_initializers()
    return clean_model(whole.model)


def _before_weights(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes between the inputs and the first heavy ones: cheap, and exact in float32."""
    weights = {tensor.name for tensor in graph.initializer}
    front_values = {value.name for value in graph.input}
    found = []
    for node in graph.node:
        computed_in_front = front_values.intersection(node.input) and set(node.input) <= front_values | weights
        if node.op_type not in HEAVY and computed_in_front:
            front_values.update(node.output)
            found.append(node)
    return found


def _without(model: onnx.ModelProto, front: list[onnx.NodeProto]) -> onnx.ModelProto:
    """A copy of the model without its first nodes; what they compute is an input of the copy."""
    early: set[str] = set()
    for node in front:
        early.update(node.output)
    rest = [node for node in model.graph.node if not early.issuperset(node.output)]
    available = early | {value.name for value in model.graph.input}
    crossing: dict[str, None] = {}  # an ordered set
    for node in rest:
        crossing.update(dict.fromkeys(name for name in node.input if name in available))
    types = {value.name: value for value in (*model.graph.input, *model.graph.value_info)}
    body = onnx.ModelProto()
    body.CopyFrom(model)
    _replace(body.graph.node, rest)
    _replace(body.graph.input, [types[name] for name in crossing])
    _replace(body.graph.value_info, [])
    return body


def _convert(body: onnx.ModelProto) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of weights too small for float16; the search measures their cost
        half: onnx.ModelProto = convert_float_to_float16(
            body, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *WIDE]
        )
    return half


def _append(graph: onnx.GraphProto, front: list[onnx.NodeProto], float_weights: Iterable[onnx.TensorProto]) -> None:
    """Add the first nodes again, each with float32 copies of its own weights."""
    weights = {tensor.name: tensor for tensor in float_weights}
    for node in front:
        for position, name in enumerate(node.input):
            if name in weights:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[name])
                copy.name = f"{node.name}.{position}"
                node.input[position] = copy.name
    graph.node.extend(front)


def _replace(old: Any, new: Iterable[Any]) -> None:
    """Replace all members of a repeated protobuf field."""
    members = [*new]
    del old[:]
    old.extend(members)
