"""Which precision each graph of a fleet has at present, and what each is calibrated on.

The extractor is calibrated on the samples; gates on the latents of the extractor as it is to be written, experts on
those latents that the gates, as they are to be written, send to them. When one of them changes, those behind it are
calibrated again.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.models import Graph
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import Candidate
from nmoe_export.samples import Samples
from nmoe_export.simulation import Graphs, Simulation, in_batches, latencies, latents_of
from nmoe_export.source import Source
from nmoe_export.targets import Target

FASTER = 1.15
"""How much faster int8 has to be than float to be worth its rounding."""
KINDS = ("extractor", "gate", "expert")


class Assignment:
    """A fleet between float and int8."""

    def __init__(
        self, source: Source, graphs: Graphs, target: Target, recipe: Recipe, samples: Samples, latent: str
    ) -> None:
        self.source, self.target, self.recipe, self.samples, self.latent = source, target, recipe, samples, latent
        self.extractor = Candidate("extractor", graphs.extractor, target, "int8")
        small = target.small_graphs
        self.gates = [Candidate(f"gate {i}", graph, target, small) for i, graph in enumerate(graphs.gates)]
        self.experts = [Candidate(f"expert {i}", graph, target, small) for i, graph in enumerate(graphs.experts)]
        self.speed: dict[str, Any] = {}
        self._seen: tuple[bytes, NDArray[np.float32]] | None = None
        self._gates_saw: NDArray[np.float32] | None = None
        self._experts_saw: list[Any] = []

    def choose_by_speed(self) -> None:
        """Measure float against int8, one row, one thread; what is no faster in int8 stays in float.

        One after another: what the extractor becomes decides what gates are calibrated on, and these on what experts.
        """
        for kind, calibrate in zip(KINDS, (self._show_extractor, self._show_gates, self._show_experts), strict=True):
            calibrate()
            faster = self._faster(kind)
            for component in self.of(kind):
                component.whole = not faster

    def _faster(self, kind: str) -> bool:
        """Whether this kind of graph is worth what it is wanted to be; where nothing can be measured it is."""
        if not all(component.fits() for component in self.of(kind)):
            return False
        if platform.machine() not in self.target.machine:
            self.speed[kind] = "unmeasured"
            return True
        latent = np.zeros((1, self.source.latent_dim), np.float32) if kind == "extractor" else self._latents()[:1]
        self.speed[kind] = speed_of(self.source, kind, self.of(kind)[0], latent)
        return bool(self.speed[kind]["times_faster"] >= FASTER)

    def slower_now(self) -> bool:
        """Measure the extractor as it has become; it goes back altogether when that is no faster than float."""
        if self.extractor.whole or not isinstance(self.speed.get("extractor"), dict):
            return False
        self.extractor.whole = not self._faster("extractor")
        return self.extractor.whole

    def of(self, kind: str) -> Sequence[Candidate]:
        """Every graph of a kind."""
        return {"extractor": [self.extractor], "gate": self.gates, "expert": self.experts}[kind]

    def back_to_float(self, name: str) -> bool:
        """Take a kind of graph, or a node of the extractor, back; False where it is in float already."""
        if name not in KINDS:
            self.extractor.floats.append(name)
            return True
        changed = not self.of(name)[0].whole
        for component in self.of(name):
            component.whole = True
        return changed

    def again(self, name: str) -> None:
        """What `back_to_float` did is undone."""
        if name not in KINDS:
            self.extractor.floats.remove(name)
            return
        for component in self.of(name):
            component.whole = False

    def slower(self) -> list[str]:
        """A line for each kind of graph that stays in float: int8 makes it no faster, or float16 cannot hold it."""
        large = [kind for kind in KINDS if not all(component.fits() for component in self.of(kind))]
        return [f"{kind} stays in float32: numbers inside it go over what float16 can say" for kind in large] + [
            f"{name} stays in float: int8 is {figures['times_faster']:.2f} times as fast here"
            for name, figures in self.speed.items()
            if isinstance(figures, dict) and figures["times_faster"] < FASTER
        ]

    def system(self) -> Simulation:
        """The fleet as it is at present."""
        self._show_gates()
        self._show_experts()
        graphs = Graphs(self.extractor.best(), [g.best() for g in self.gates], [e.best() for e in self.experts])
        return Simulation(self.source, graphs, self.latent)

    def precision(self) -> dict[str, str]:
        """As the manifest says it."""
        return {kind: self.of(kind)[0].precision() for kind in KINDS}

    def _latents(self) -> NDArray[np.float32]:
        """The samples' latents by the extractor as it is at present."""
        extractor = self.extractor.best()
        if self._seen is None or self._seen[0] != extractor:
            self._seen = extractor, latents_of(self.source, extractor, self.samples.inputs)
        return self._seen[1]

    def _show_extractor(self) -> None:
        self.extractor.calibrate(self.samples.inputs, self.recipe)

    def _show_gates(self) -> None:
        latents = self._latents()
        if latents is not self._gates_saw:
            self._gates_saw = latents
            for gate in self.gates:
                gate.calibrate(latents, self.recipe)

    def _show_experts(self) -> None:
        latents, gates = self._latents(), [gate.best() for gate in self.gates]
        if self._experts_saw and self._experts_saw[0] is latents and self._experts_saw[1] == gates:
            return
        self._experts_saw = [latents, gates]
        sent = sent_to(self.source, gates, latents, self.samples.clients)
        for i, expert in enumerate(self.experts):
            rows = sent[:, i]
            if self.samples.clients is not None:
                rows = rows | (self.samples.clients == i)  # its own, which stay at home
            expert.calibrate(latents[rows] if rows.sum() >= self.recipe.least else latents, self.recipe)


def sent_to(
    source: Source, gates: Sequence[bytes], latents: NDArray[np.float32], clients: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Which experts each sample is sent to (n, experts): by its own client's gate, by any where that is not known."""
    dim, experts = (source.latent_dim,), (len(source.experts),)
    sent = np.zeros((len(gates), len(latents), len(source.experts)), bool)
    for gate, graph in enumerate(gates):
        best = np.argsort(-in_batches(Graph("gate", graph, dim, experts), latents), 1, kind="stable")
        np.put_along_axis(sent[gate], best[:, : source.inference.top_k], True, 1)
    if clients is None or len(gates) == 1:
        return np.any(sent, axis=0)  # type: ignore[no-any-return]  # (n, experts)
    return sent[clients, np.arange(len(latents))]


def speed_of(source: Source, kind: str, component: Candidate, latent: NDArray[np.float32]) -> dict[str, float]:
    """Float against what a graph has become, one row, one thread; its size, though it may stay float."""
    reduced, dim = component.reduced(), (source.latent_dim,)
    row_in, row_out, row = {
        "extractor": (source.input.shape, dim, source.inputs[:1]),
        "gate": (dim, (len(source.experts),), latent),
        "expert": (dim, (source.outputs,), latent),
    }[kind]
    took = latencies({"float": component.graph, "written": reduced}, row_in, row_out, row)
    return {
        "float_ms": took["float"],
        "written_ms": took["written"],
        "times_faster": took["float"] / took["written"],
        "reduced_bytes": len(reduced),
    }
