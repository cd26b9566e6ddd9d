"""A float graph -> the same in float16: half the bytes, and what GPUs are fastest in."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import onnx
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from nmoe_export.graphs import cleaned

HEAVY = ("Conv", "Gemm", "MatMul", "Gather")
"""What multiplies by weights or looks them up."""
WIDE = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "LogSoftmax")
"""Stays in float32: squares and powers overflow float16 early, and onnxruntime 1.15 cannot run them in it on a CPU."""


def halved(graph: bytes) -> bytes:
    """Float16 between inputs as they were and a float32 output; what makes a picture of bytes stays in float32."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    light = _before_heavy(model.graph)
    body = onnx.ModelProto()
    body.CopyFrom(model)
    known = {value.name: value for value in (*model.graph.input, *model.graph.value_info)}
    early = {name for node in light for name in node.output}
    rest = [node for node in model.graph.node if not early.issuperset(node.output)]
    made = early | {value.name for value in model.graph.input}
    crossing = list(dict.fromkeys(name for node in rest for name in node.input if name in made))
    _replace(body.graph.node, rest)
    _replace(body.graph.input, [known[name] for name in crossing])
    _replace(body.graph.value_info, [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are less than float16 can say; what that costs is measured
        half = convert_float_to_float16(body, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *WIDE])
    _replace(half.graph.input, model.graph.input)
    _replace(half.graph.value_info, [])
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in light:
        for place, name in enumerate(node.input):
            if name in weights:
                own = half.graph.initializer.add()
                own.CopyFrom(weights[name])
                own.name = node.input[place] = f"{node.name}.{place}"
    half.graph.node.extend(light)
    whole = ONNXModel(half)
    whole.topological_sort()
    whole.clean_initializers()
    return cleaned(whole.model)


def _before_heavy(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes between the inputs and the first heavy ones: cheap, and exact in float32."""
    weights = {tensor.name for tensor in graph.initializer}
    light = {value.name for value in graph.input}
    found = []
    for node in graph.node:
        if node.op_type not in HEAVY and light.intersection(node.input) and set(node.input) <= light | weights:
            light.update(node.output)
            found.append(node)
    return found


def _replace(old: Any, new: Iterable[Any]) -> None:
    """All members of a repeated field of a protobuf."""
    members = [*new]
    del old[:]
    old.extend(members)
