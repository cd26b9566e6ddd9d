"""Counts what onnxruntime's optimizer makes of an int8 extractor on a CPU, to show that it computes in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import onnxruntime

from nmoe_export.quantize import optimise


@dataclass(frozen=True, slots=True)
class Fusion:
    """Operators of a graph after optimization. An addition is residual when both of its inputs are computed."""

    operators: Mapping[str, int]
    """How many there are of each kind."""
    convs: int
    """Convolutions expected to be integer."""
    convs_integer: int
    adds: int
    """Residual additions expected to be integer."""
    adds_integer: int
    pairs_left: int
    """QuantizeLinear and DequantizeLinear nodes that the optimizer did not merge into an integer operator."""

    def missing(self) -> str:
        """A line that says what is expected to be integer and is not; empty when nothing is missing."""
        convs = max(self.convs - self.convs_integer, 0)
        adds = max(self.adds - self.adds_integer, 0)
        if not convs and not adds:
            return ""
        return (
            f"{convs} of {self.convs} convolutions and {adds} of {self.adds} residual additions"
            " of the extractor are not computed in integers"
        )


def fusion(graph: bytes, model: onnx.ModelProto, float_nodes: Collection[str]) -> Fusion:
    """Count the operators of the int8 `graph` made from `model`, in which `float_nodes` stay in float on purpose."""
    optimised_graph = optimise(graph, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    nodes = onnx.load_from_string(optimised_graph).graph
    counts = Counter(node.op_type for node in nodes.node)
    expected = [node for node in model.graph.node if node.name not in float_nodes]
    return Fusion(
        operators=dict(counts),
        convs=sum(node.op_type == "Conv" for node in expected),
        convs_integer=counts["QLinearConv"],
        adds=sum(_is_residual(model.graph, node, "Add", (0, 1)) for node in expected),
        # The inputs of QLinearAdd are a tensor, its scale and its zero point, twice.
        adds_integer=sum(_is_residual(nodes, node, "QLinearAdd", (0, 3)) for node in nodes.node),
        pairs_left=counts["QuantizeLinear"] + counts["DequantizeLinear"],
    )


def _is_residual(graph: onnx.GraphProto, node: onnx.NodeProto, kind: str, positions: tuple[int, int]) -> bool:
    """Whether `node` is of this kind and its inputs at both positions are computed, not weights."""
    if node.op_type != kind:
        return False
    computed: set[str] = set()
    for other in graph.node:
        computed.update(other.output)
    return all(node.input[position] in computed for position in positions)
