"""One graph of a fleet, what it may become, and what it is at present."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from nmoe_export.cache import cached_ranges
from nmoe_export.calibrate import Range, Recipe
from nmoe_export.fp16 import halved
from nmoe_export.progress import Count, Say
from nmoe_export.quantize import quantizable, quantize, simplified, unranged
from nmoe_export.simulation import latents_of
from nmoe_export.source import Source
from nmoe_export.targets import Target

GREATEST = 65504.0
"""Number that float16 has."""


class Candidate:
    """A float graph, its ranges, and which of its nodes stay in float."""

    def __init__(self, name: str, graph: bytes, target: Target, wanted: Literal["int8", "fp16"]) -> None:
        """wanted: what it becomes unless it goes back to float"""
        self.name, self.graph, self.target, self.wanted = name, graph, target, wanted
        self.floats: list[str] = []
        """Nodes that stay in float."""
        self.whole = False
        """Whether it stays in float altogether."""
        self.greatest = 0.0
        """Number inside it, where it is to be float16."""
        self.model = simplified(graph) if wanted == "int8" else None
        self._ranges: dict[str, Range] = {}
        self._reduced: dict[tuple[str, ...], bytes] = {}

    def calibrate(self, inputs: NDArray[Any], recipe: Recipe) -> None:
        """Let it see what it will receive."""
        if self.model is None:
            found = cached_ranges(onnx.load_from_string(self.graph), inputs, replace(recipe, method="minmax"), False)
            self.greatest = max((abs(edge) for both in found.values() for edge in both), default=0.0)
        else:
            self._ranges = cached_ranges(self.model, inputs, recipe, self.target.symmetric)
            self._reduced = {}

    def fits(self) -> bool:
        """Whether what it computes can be said: int8 has a scale, float16 has none."""
        return self.greatest <= GREATEST

    def nodes(self) -> list[str]:
        """Those that could be int8 and could go back to float."""
        if self.model is None:
            return []
        without = set(unranged(self.model, self._ranges))
        return [node for node in quantizable(self.model) if node not in without]

    def left_float(self) -> list[str]:
        """Nodes that are not int8 on purpose: they went back, or have no ranges."""
        return [] if self.model is None else [*self.floats, *unranged(self.model, self._ranges)]

    def reduced(self) -> bytes:
        """As it is wanted, but for the nodes that stay in float."""
        key = tuple(self.floats)
        if key not in self._reduced:
            made = halved(self.graph) if self.model is None else quantize(self.model, self._ranges, self.target, key)
            self._reduced[key] = made
        return self._reduced[key]

    def precision(self) -> str:
        """As the manifest says it."""
        nothing = self.model is not None and set(self.nodes()) <= set(self.floats)
        return "fp32" if self.whole or nothing else self.wanted

    def best(self) -> bytes:
        """As it is to be written."""
        return self.graph if self.precision() == "fp32" else self.reduced()

    def noise(self, source: Source, inputs: NDArray[Any], say: Say) -> dict[str, float]:
        """For each node that computes, the latents' power over that of its noise when it alone is int8, in dB."""
        if self.model is None:
            return {}
        nodes, true = self.nodes(), latents_of(source, self.graph, inputs)
        found = {}
        for number, node in enumerate(nodes, 1):
            alone = quantize(self.model, self._ranges, self.target, [other for other in nodes if other != node])
            noise = float(((latents_of(source, alone, inputs) - true) ** 2).sum())
            found[node] = round(10 * float(np.log10(max(float((true**2).sum()), 1e-30) / max(noise, 1e-30))), 2)
            say(Count("node {} tried in int8 alone", number, len(nodes)))
        return found
