"""Runs a fleet's graphs as devices do: in nmoe_edge's sessions, with latents as they travel, under the run's rules.

A `Simulation` computes each graph's outputs for all samples once; its methods measure accuracy and routing from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.models import Graph
from nmoe_edge.protocol.answering import AnswerRules, answer_adapted
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.thresholds import LabelledRows, accuracy, choose_local_first
from nmoe_export.source import Source

KINDS = ("extractor", "gate", "expert")
BATCH = 256


@dataclass(frozen=True, slots=True, eq=False)
class Graphs:
    """The ONNX graphs of a fleet, as bytes."""

    extractor: bytes
    gates: Sequence[bytes]
    experts: Sequence[bytes]

    def of_kind(self, kind: str) -> Sequence[bytes]:
        """Every graph of one of `KINDS`."""
        return {"extractor": [self.extractor], "gate": self.gates, "expert": self.experts}[kind]


class Simulation:
    """What a fleet's graphs compute for the source's samples."""

    def __init__(self, source: Source, graphs: Graphs, latent: str) -> None:
        """`latent` is the type that latents travel as."""
        self.source = source
        self.graphs = graphs
        self.latents = latents_of(source, graphs.extractor)
        """(n, latent_dim), as the extractor returns them"""
        self.scores = [gate_scores(source, gate, self.latents) for gate in graphs.gates]
        """one array (n, experts) for each gate"""
        received = np.array(Tensor.pack(self.latents, latent).unpack())
        outputs = [_in_batches(expert_session(source, expert), received) for expert in graphs.experts]
        self.outputs = np.stack(outputs, 1)
        """(n, experts, outputs), of latents as they travel"""

    def scores_of(self, device: int) -> NDArray[np.float32]:
        """The scores of a device's gate, (n, experts)."""
        return self.scores[device % len(self.scores)]

    def rows(self, device: int, chosen: NDArray[np.int64]) -> LabelledRows:
        """The samples numbered `chosen` as a device sees them. Without labels, all labels are 0."""
        labels = self.source.labels
        if labels is None:
            labels = np.zeros(len(self.latents), np.int64)
        distances = None
        if self.source.familiar is not None:
            distances = self.source.familiar[device].distances(self.latents[chosen])
        return LabelledRows(device, self.scores_of(device)[chosen], self.outputs[chosen], labels[chosen], distances)

    def load(self) -> list[float]:
        """The share of the measured samples for which the gates prefer each expert, averaged over gates."""
        experts = len(self.graphs.experts)
        measured = self.source.measured_rows
        shares = [np.bincount(scores[measured].argmax(1), minlength=experts) / len(measured) for scores in self.scores]
        return [float(share) for share in np.mean(shares, axis=0)]

    def threshold(self) -> AnswerRules:
        """The source's rules, with `local_first` chosen again for these graphs where it is in use.

        The calibration half of the samples chooses it. The source's threshold stays when a client has no sample there.
        """
        rules = self.source.inference
        clients = self.source.clients
        if rules.local_first is None or self.source.labels is None or clients is None:
            return rules
        chosen = self.source.calibration_rows
        devices = range(len(self.graphs.experts))
        own = [self.rows(device, chosen[clients[chosen] == device]) for device in devices]
        if not all(len(rows.labels) for rows in own):
            return rules
        everything = [self.rows(device, chosen) for device in devices]
        return replace(rules, local_first=choose_local_first(own, everything, rules))

    def answered_classes(self, rules: AnswerRules) -> NDArray[np.int64]:
        """The class that each device answers for each measured sample, (devices, n)."""
        answered = []
        for device in range(len(self.graphs.experts)):
            rows = self.rows(device, self.source.measured_rows)
            answered.append(answer_adapted(rows.scores, rows.outputs, device, rules, rows.distances).p.argmax(axis=1))
        return np.stack(answered)

    def accuracy(self, device: int, rules: AnswerRules) -> float:
        """A device's share of right answers to the measured samples. The source must have labels."""
        return accuracy(self.rows(device, self.source.measured_rows), rules)

    def accuracies(self, rules: AnswerRules) -> list[float]:
        """`accuracy` of every device."""
        return [self.accuracy(device, rules) for device in range(len(self.graphs.experts))]


def latents_of(source: Source, extractor: bytes, inputs: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """The latents (n, latent_dim) of `inputs`, by default of all the source's samples."""
    session = Graph("extractor", extractor, source.input.shape, (source.latent_dim,))
    return _in_batches(session, source.inputs if inputs is None else inputs)


def gate_scores(source: Source, gate: bytes, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """A gate's scores (n, experts)."""
    return _in_batches(Graph("gate", gate, (source.latent_dim,), (len(source.experts),)), latents)


def expert_session(source: Source, expert: bytes) -> Graph:
    return Graph("expert", expert, (source.latent_dim,), (source.outputs,))


def _in_batches(graph: Graph, rows: NDArray[Any]) -> NDArray[np.float32]:
    """graph(rows), at most BATCH rows at a time."""
    return np.concatenate([graph(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])


def gate_agreement(one: Simulation, two: Simulation) -> float:
    """The share of the measured samples for which both gates prefer the same expert, averaged over gates."""
    measured = one.source.measured_rows
    shares = []
    for first, second in zip(one.scores, two.scores, strict=True):
        shares.append((first[measured].argmax(1) == second[measured].argmax(1)).mean())
    return float(np.mean(shares))
