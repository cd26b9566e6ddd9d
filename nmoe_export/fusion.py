"""What onnxruntime's optimizer makes of an int8 extractor on a CPU: the proof that it computes in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import onnxruntime

from nmoe_export.quantize import optimised


@dataclass(frozen=True, slots=True)
class Fusion:
    """Counts of a graph as it runs."""

    operators: Mapping[str, int]
    """Of each kind."""
    convs: int
    """That were to be integer."""
    convs_integer: int
    adds: int
    """Residual ones, of two tensors that are computed, that were to be integer."""
    adds_integer: int
    pairs_left: int
    """Nodes that still round or undo it: what the optimizer could not take into an integer operator."""

    def missing(self) -> str:
        """A line about what is not integer and should be; empty where nothing is."""
        convs, adds = self.convs - self.convs_integer, self.adds - self.adds_integer
        if convs <= 0 and adds <= 0:
            return ""
        return (
            f"{max(convs, 0)} of {self.convs} convolutions and {max(adds, 0)} of {self.adds} residual additions"
            " of the extractor are not computed in integers"
        )


def fusion(graph: bytes, model: onnx.ModelProto, floats: Collection[str]) -> Fusion:
    """Of an int8 graph that was made of `model`, whose nodes named in `floats` were to stay as they are."""
    nodes = onnx.load_from_string(optimised(graph, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)).graph
    counts = Counter(node.op_type for node in nodes.node)
    due = [node for node in model.graph.node if node.name not in floats]
    return Fusion(
        operators=dict(counts),
        convs=sum(node.op_type == "Conv" for node in due),
        convs_integer=counts["QLinearConv"],
        adds=sum(_of_two(model.graph, node, "Add", (0, 1)) for node in due),
        # Its inputs are a tensor, a scale and a zero point, twice.
        adds_integer=sum(_of_two(nodes, node, "QLinearAdd", (0, 3)) for node in nodes.node),
        pairs_left=counts["QuantizeLinear"] + counts["DequantizeLinear"],
    )


def _of_two(graph: onnx.GraphProto, node: onnx.NodeProto, kind: str, places: tuple[int, int]) -> bool:
    """Whether this operator takes two tensors that are computed, not a weight."""
    computed = {name for other in graph.node for name in other.output}
    return node.op_type == kind and all(node.input[place] in computed for place in places)
