"""What each device's bundle holds: its manifest, its graphs, and the answers that another machine must give again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import SCHEMA, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, trunk_digest
from nmoe_edge.bundle.selftest import SelfTest
from nmoe_edge.models import Graph
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.routing import route
from nmoe_export.graphs import IR_VERSION, OPSET
from nmoe_export.precision import Made
from nmoe_export.simulation import Simulation
from nmoe_export.source import Source

SELFTEST_ROWS = 8
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 2e-2}
"""What another machine may differ by, of the largest number in the self-test: float32 sums in another order give 1e-6,
float16 units against a CPU that computes in float32 2e-3 for a ResNet18, an int8 step that is rounded the other way a
part in 127."""


class Writer:
    """Manifests and files of each device."""

    def __init__(self, source: Source, made: Made, target: str, latent: str) -> None:
        """target: the profile that the graphs are made for; latent: what latents travel as"""
        self.source, self.made, self.target, self.latent = source, made, target, latent
        self.system = Simulation(source, made.graphs, latent)
        self.sizes: dict[str, int] = {}

    def bundle(self, number: int) -> tuple[Manifest, dict[str, bytes]]:
        """A device's manifest and files."""
        source, graphs, rules = self.source, self.made.graphs, self.made.rules
        contents = {
            "extractor.onnx": graphs.extractor,
            "gate.onnx": graphs.gates[number % len(graphs.gates)],
            "expert.onnx": graphs.experts[number],
            "selftest.npz": self._selftest(number).write(),
        }
        if source.names is not None:
            contents["labels.txt"] = ("\n".join(source.names) + "\n").encode()
        self.sizes = {name: len(data) for name, data in contents.items()}
        experts = len(source.experts)
        manifest = Manifest(
            schema=SCHEMA,
            device=f"device-{number:02}",
            experts=experts,
            expert=number,
            outputs=source.outputs,
            answers_carry_prior=source.answers_carry_prior,
            input=source.input,
            latent=LatentSpec(source.latent_dim, self.latent),  # type: ignore[arg-type]  # one of the options
            routing=RoutingSpec(rules.top_k, rules.combination, rules.local_first, rules.adapt),
            precision=PrecisionSpec(**self.made.precision),  # type: ignore[arg-type]  # of KINDS
            target=self.target,  # type: ignore[arg-type]  # one of the targets, or any
            opset=OPSET,
            ir_version=IR_VERSION,
            accuracy={} if source.labels is None else {source.samples: self._accuracy(number, source.labels)},
            extractor_source=source.extractor_source,
            trunk=trunk_digest(source.extractor_source, source.latent_dim, experts, source.outputs),
        )
        return manifest, contents

    def _selftest(self, number: int) -> SelfTest:
        """Of the clearer half of the routes, for another CPU's last bit must not choose another expert: the clearest of
        each expert, then the second of each.
        """
        system, scores = self.system, self.system.scores[number % len(self.system.scores)]
        top_k, experts = self.made.rules.top_k, scores.shape[1]
        ranked = -np.sort(-scores, axis=1)[:, : top_k + 1]
        margin = (ranked[:, :-1] - ranked[:, 1:]).min(axis=1, initial=np.inf)  # of the order as well as of the choice
        clear = np.argsort(-margin, kind="stable")[: max(SELFTEST_ROWS, len(margin) // 2)]
        turns, seen = [], Counter[int]()
        for favourite in scores[clear].argmax(axis=1).tolist():
            turns.append(seen[favourite])
            seen[favourite] += 1
        rows = clear[np.argsort(turns, kind="stable")[:SELFTEST_ROWS]]
        chosen = route(scores[rows], number, range(experts), top_k).chosen
        latents = system.latents[rows]
        expert = Graph("expert", self.made.graphs.experts[number], (self.source.latent_dim,), (self.source.outputs,))
        outputs = expert(latents)  # of the latents themselves, not as they travel
        loosest = max(TOLERANCES[precision] for precision in self.made.precision.values())
        return SelfTest(
            self.source.inputs[rows],
            latents,
            np.array(chosen, np.int64),
            outputs,
            np.array(loosest * max(1.0, float(np.abs(latents).max()))),
            np.array(loosest * max(1.0, float(np.abs(outputs).max()))),
        )

    def _accuracy(self, number: int, labels: NDArray[Any]) -> float:
        """Share of the measured samples that this device's gate and the experts it chooses get right."""
        rules, rows = self.made.rules, self.source.measured
        scores, outputs = self.system.scores[number % len(self.system.scores)][rows], self.system.outputs[rows]
        right = 0
        for row, experts in enumerate(route(scores, number, range(scores.shape[1]), rules.top_k).chosen):
            answers = {expert: outputs[row, expert] for expert in experts}
            weights = expert_weights(scores[row], experts)
            right += int(combine(answers, weights, rules.combination).argmax() == labels[rows[row]])
        return right / len(rows)
