"""A fleet's graphs as devices run them: nmoe_edge's own sessions, latents as they travel, the run's rules.

What it answers is measured here: accuracy, agreement with another precision, speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nmoe_edge.models import Graph
from nmoe_edge.protocol.tensor import Tensor
from nmoe_export.source import Source
from nmoe_train.results.evaluation import DeviceRows, accuracy, answers, choose_threshold
from nmoe_train.run import Inference

BATCH = 256


@dataclass(frozen=True, slots=True, eq=False)
class Graphs:
    """A fleet's graphs in one precision, or in the best of each."""

    extractor: bytes
    gates: Sequence[bytes]
    experts: Sequence[bytes]


class Simulation:
    """What these graphs make of the source's samples."""

    def __init__(self, source: Source, graphs: Graphs, latent: str, latents: NDArray[np.float32] | None = None) -> None:
        """latent: what latents travel as; latents: the extractor's, where they are known"""
        self.source, self.graphs = source, graphs
        self.latents = latents_of(source, graphs.extractor) if latents is None else latents
        dim, experts = (source.latent_dim,), len(graphs.experts)
        self.scores = [in_batches(Graph("gate", gate, dim, (experts,)), self.latents) for gate in graphs.gates]
        """Of each gate (n, N)"""
        travelled = np.array(Tensor.pack(self.latents, latent).unpack())
        self.outputs = np.stack(
            [in_batches(Graph("expert", e, dim, (source.outputs,)), travelled) for e in graphs.experts], 1
        )
        """(n, N, K)"""

    def rows(self, device: int, chosen: NDArray[np.int64]) -> DeviceRows:
        """What a device makes of some of the samples."""
        labels = self.source.labels if self.source.labels is not None else np.zeros(len(self.latents), np.int64)
        scores = self.scores[device % len(self.scores)]
        return DeviceRows(*(torch.from_numpy(np.array(a[chosen])) for a in (scores, self.outputs, labels)))

    def load(self) -> list[float]:
        """Share of the measured samples for which the gates prefer each expert, the mean over gates."""
        experts, rows = len(self.graphs.experts), self.source.measured
        shares = [np.bincount(scores[rows].argmax(1), minlength=experts) / len(rows) for scores in self.scores]
        return [float(share) for share in np.mean(shares, axis=0)]

    def threshold(self) -> Inference:
        """The rules of the source, with local_first chosen again on these graphs where it is in use.

        The samples that are shown choose it; where a device has none of its own, the source's stays.
        """
        rules, clients, shown = self.source.inference, self.source.clients, self.source.shown
        if rules.local_first is None or self.source.labels is None or clients is None:
            return rules
        devices = range(len(self.graphs.experts))
        own = [self.rows(i, shown[clients[shown] == i]) for i in devices]
        if not all(len(rows.y) for rows in own):
            return rules
        return replace(rules, local_first=choose_threshold(own, [self.rows(i, shown) for i in devices], rules))

    def answered(self, rules: Inference) -> NDArray[np.int64]:
        """The class that each device answers to each measured sample (devices, n)."""
        devices, measured = range(len(self.graphs.experts)), self.source.measured
        return np.stack([answers(self.rows(i, measured), i, rules)[0].argmax(1).numpy() for i in devices])

    def accuracies(self, rules: Inference) -> list[float]:
        """Each device's share of right answers to the measured samples; needs labels."""
        parts = [self.rows(i, self.source.measured) for i in range(len(self.graphs.experts))]
        return [accuracy(answers(rows, i, rules)[0], rows.y) for i, rows in enumerate(parts)]


def latents_of(source: Source, extractor: bytes, inputs: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """What this extractor makes of the source's samples, or of others."""
    graph = Graph("extractor", extractor, source.input.shape, (source.latent_dim,))
    return in_batches(graph, source.inputs if inputs is None else inputs)


def in_batches(graph: Graph, rows: NDArray[Any]) -> NDArray[np.float32]:
    """graph(rows), a bounded number at a time."""
    return np.concatenate([graph(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])


def gate_agreement(one: Simulation, two: Simulation) -> float:
    """Share of the measured samples for which both gates have the same favourite, the mean over gates."""
    rows, both = one.source.measured, zip(one.scores, two.scores, strict=True)
    return float(np.mean([(a[rows].argmax(1) == b[rows].argmax(1)).mean() for a, b in both]))


def latencies(
    graphs: Mapping[str, bytes],
    row_in: tuple[int, ...],
    row_out: tuple[int, ...],
    row: NDArray[Any],
    seconds: float = 0.4,
) -> dict[str, float]:
    """Median milliseconds for one row on one thread, the graphs taking turns so that noise meets them alike."""
    sessions = {name: Graph(name, data, row_in, row_out) for name, data in graphs.items()}
    took: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        for _ in range(3):
            session(row)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(took.values()))) < 9:
        for name, session in sessions.items():
            began = time.perf_counter()
            session(row)
            took[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(values) for name, values in took.items()}
