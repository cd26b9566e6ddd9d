"""Which parts of a fleet stay in float, and the graphs that follow from that.

Each graph is calibrated on what it will receive. The extractor is calibrated on the calibration samples, gates on the
latents of the extractor as it will be written, and experts on the latents that those gates send to them. So gates and
experts are calibrated again whenever the extractor changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.protocol.routing import ranking
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import Candidate
from nmoe_export.samples import Samples
from nmoe_export.simulation import KINDS, Graphs, gate_scores, latents_of
from nmoe_export.source import Source
from nmoe_export.targets import Target


@dataclass(frozen=True, slots=True)
class Assignment:
    """The parts of a fleet that stay in float. A part is one of `KINDS` or the name of a node of the extractor."""

    kinds: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    """Nodes of the extractor."""

    def is_float(self, part: str) -> bool:
        """Whether `part` stays in float."""
        return part in self.kinds or part in self.nodes

    def with_float(self, part: str) -> Assignment:
        """The same assignment, but with `part` in float."""
        if part in KINDS:
            return replace(self, kinds=self.kinds | {part})
        return replace(self, nodes=self.nodes | {part})

    def without_float(self, part: str) -> Assignment:
        """The same assignment, but with `part` reduced."""
        return Assignment(self.kinds - {part}, self.nodes - {part})

    def float_nodes(self, kind: str) -> frozenset[str]:
        """The nodes of a kind's graphs that stay in float."""
        return self.nodes if kind == "extractor" else frozenset()


class Candidates:
    """The candidates of every graph in a fleet, calibrated and reduced as an assignment says."""

    def __init__(self, source: Source, graphs: Graphs, target: Target, recipe: Recipe, samples: Samples) -> None:
        """`graphs` are the float ones; `samples` calibrate them."""
        self.source = source
        self.target = target
        self.extractor = Candidate("extractor", graphs.extractor, target, "int8")
        small = target.small_graphs
        self._gates = [Candidate(f"gate {i}", graph, target, small) for i, graph in enumerate(graphs.gates)]
        self._experts = [Candidate(f"expert {i}", graph, target, small) for i, graph in enumerate(graphs.experts)]
        self._recipe = recipe
        self._samples = samples
        # The inputs of the last calculation of each kind: a calibration on the same inputs is skipped.
        self._latents: tuple[bytes, NDArray[np.float32]] | None = None
        self._gates_saw: NDArray[np.float32] | None = None
        self._experts_saw: tuple[NDArray[np.float32], list[bytes]] | None = None

    def of_kind(self, kind: str) -> Sequence[Candidate]:
        """Every candidate of one of `KINDS`."""
        return {"extractor": [self.extractor], "gate": self._gates, "expert": self._experts}[kind]

    def graphs(self, assignment: Assignment) -> Graphs:
        """The fleet's graphs under `assignment`, with gates and experts calibrated for its extractor."""
        self.calibrate("gate", assignment)
        self.calibrate("expert", assignment)
        (extractor,) = self._written("extractor", assignment)
        return Graphs(extractor, self._written("gate", assignment), self._written("expert", assignment))

    def precision(self, assignment: Assignment) -> dict[str, str]:
        """The precision of each kind, as the manifest has it."""
        return {kind: _precision(self.of_kind(kind)[0], kind, assignment) for kind in KINDS}

    def calibrate(self, kind: str, assignment: Assignment) -> None:
        """Calibrate every candidate of a kind on what it will receive under `assignment`."""
        if kind == "extractor":
            self.extractor.calibrate(self._samples.inputs, self._recipe)
        elif kind == "gate":
            self._calibrate_gates(assignment)
        else:
            self._calibrate_experts(assignment)

    def latents(self, assignment: Assignment) -> NDArray[np.float32]:
        """The latents of the calibration samples, by the extractor under `assignment`."""
        (extractor,) = self._written("extractor", assignment)
        if self._latents is None or self._latents[0] != extractor:
            self._latents = (extractor, latents_of(self.source, extractor, self._samples.inputs))
        return self._latents[1]

    def _calibrate_gates(self, assignment: Assignment) -> None:
        latents = self.latents(assignment)
        if latents is self._gates_saw:
            return
        self._gates_saw = latents
        for gate in self._gates:
            gate.calibrate(latents, self._recipe)

    def _calibrate_experts(self, assignment: Assignment) -> None:
        latents = self.latents(assignment)
        gates = self._written("gate", assignment)
        if self._experts_saw is not None and self._experts_saw[0] is latents and self._experts_saw[1] == gates:
            return
        self._experts_saw = (latents, gates)
        clients = self._samples.clients
        sent = sent_to(self.source, gates, latents, clients)
        for number, expert in enumerate(self._experts):
            rows = sent[:, number]
            if clients is not None:
                rows = rows | (clients == number)  # the rows of its own client, which it may answer locally
            enough = rows.sum() >= self._recipe.least
            expert.calibrate(latents[rows] if enough else latents, self._recipe)

    def _written(self, kind: str, assignment: Assignment) -> list[bytes]:
        """The graphs of a kind as they are written under `assignment`."""
        float_nodes = assignment.float_nodes(kind)
        graphs = []
        for candidate in self.of_kind(kind):
            in_float = _precision(candidate, kind, assignment) == "fp32"
            graphs.append(candidate.graph if in_float else candidate.reduced_graph(float_nodes))
        return graphs


def _precision(candidate: Candidate, kind: str, assignment: Assignment) -> str:
    return "fp32" if kind in assignment.kinds else candidate.precision(assignment.float_nodes(kind))


def sent_to(
    source: Source, gates: Sequence[bytes], latents: NDArray[np.float32], clients: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Which experts each sample is sent to, (n, experts).

    The gate of a sample's own client decides. Where clients are unknown, a sample goes where any gate sends it.
    """
    sent = np.zeros((len(gates), len(latents), len(source.experts)), bool)
    for number, gate in enumerate(gates):
        ranked = ranking(gate_scores(source, gate, latents))
        np.put_along_axis(sent[number], ranked[:, : source.inference.top_k], True, 1)
    if clients is None or len(gates) == 1:
        return np.any(sent, axis=0)  # type: ignore[no-any-return]  # numpy's stub says Any
    return sent[clients, np.arange(len(latents))]
