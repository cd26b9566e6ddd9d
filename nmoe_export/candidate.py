"""One float graph of a fleet and what it can become: int8, with some nodes left in float, or float16."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from nmoe_edge.common.progress import Count, Progress
from nmoe_export.cache import cached_ranges
from nmoe_export.calibrate import Range, Recipe
from nmoe_export.fp16 import to_float16
from nmoe_export.quantize import nodes_without_range, quantizable, quantize, simplify
from nmoe_export.simulation import latents_of
from nmoe_export.source import Source
from nmoe_export.targets import Target

FLOAT16_MAX = 65504.0
"""The largest finite float16."""
_NONE: frozenset[str] = frozenset()


class Candidate:
    """A float graph, the precision it is reduced to, and what calibration found in it.

    Methods that take `float_nodes` leave the nodes of these names in float. float16 ignores them.
    """

    def __init__(self, name: str, graph: bytes, target: Target, wanted: Literal["int8", "fp16"]) -> None:
        """`name` is used in error messages; `wanted` is the precision to reduce `graph` to."""
        self.name = name
        self.graph = graph
        self.wanted = wanted
        self.largest = 0.0
        """The largest magnitude inside the graph during calibration. Measured for float16 only."""
        self._target = target
        self._model = simplify(graph) if wanted == "int8" else None
        self._ranges: dict[str, Range] = {}
        self._reduced: dict[frozenset[str], bytes] = {}

    @property
    def model(self) -> onnx.ModelProto | None:
        """The simplified float graph that is quantized; None for float16."""
        return self._model

    def calibrate(self, inputs: NDArray[Any], recipe: Recipe) -> None:
        """Find the range of every tensor in the graph while it computes `inputs`."""
        if self._model is None:
            minmax = replace(recipe, method="minmax")
            ranges = cached_ranges(onnx.load_from_string(self.graph), inputs, minmax, symmetric=False)
            self.largest = max((max(abs(low), abs(high)) for low, high in ranges.values()), default=0.0)
        else:
            self._ranges = cached_ranges(self._model, inputs, recipe, self._target.symmetric)
            self._reduced = {}

    def fits(self) -> bool:
        """Whether the wanted precision can represent every value. int8 has a scale and always can."""
        return self.largest <= FLOAT16_MAX

    def nodes(self) -> list[str]:
        """The nodes that int8 reduces and that can go back to float one by one."""
        if self._model is None:
            return []
        without_range = set(nodes_without_range(self._model, self._ranges))
        return [node for node in quantizable(self._model) if node not in without_range]

    def nodes_in_float(self, float_nodes: Set[str]) -> list[str]:
        """The nodes that int8 leaves in float: `float_nodes` and those without a range."""
        if self._model is None:
            return []
        return [*sorted(float_nodes), *nodes_without_range(self._model, self._ranges)]

    def reduced_graph(self, float_nodes: Set[str] = _NONE) -> bytes:
        """The graph in the wanted precision."""
        key = frozenset(float_nodes)
        if key not in self._reduced:
            if self._model is None:
                self._reduced[key] = to_float16(self.graph)
            else:
                self._reduced[key] = quantize(self._model, self._ranges, self._target, key)
        return self._reduced[key]

    def precision(self, float_nodes: Set[str] = _NONE) -> str:
        """`wanted`, or "fp32" when int8 would reduce no node at all."""
        nothing_reduced = self._model is not None and set(self.nodes()) <= float_nodes
        return "fp32" if nothing_reduced else self.wanted

    def snr_db(self, source: Source, inputs: NDArray[Any], progress: Progress) -> dict[str, float]:
        """For each node of an extractor, the signal-to-noise ratio of the latents in dB when it alone is int8."""
        if self._model is None:
            return {}
        nodes = self.nodes()
        exact = latents_of(source, self.graph, inputs)
        signal = max(float((exact**2).sum()), 1e-30)
        ratios = {}
        for number, node in enumerate(nodes, 1):
            others = [other for other in nodes if other != node]
            latents = latents_of(source, quantize(self._model, self._ranges, self._target, others), inputs)
            error = max(float(((latents - exact) ** 2).sum()), 1e-30)
            ratios[node] = round(10 * float(np.log10(signal / error)), 2)
            progress(Count("int8 tried on node {} alone", number, len(nodes)))
        return ratios
