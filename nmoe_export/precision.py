"""Float graphs -> the int8 graphs that are worth it: calibrated, measured, and put back to float where they lose.

The extractor is calibrated on the samples; gate and experts on what they will receive: the int8 extractor's latents,
an expert on those that the gates send to it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.models import Graph
from nmoe_export.calibrate import Range, Recipe, drawn, ranges
from nmoe_export.errors import DropError
from nmoe_export.quantize import fused, quantizable, quantize, simplified
from nmoe_export.source import Say, Source
from nmoe_export.system import Graphs, System, gate_agreement, in_batches, latencies, latents_of
from nmoe_export.targets import Target
from nmoe_train.run import Inference

FASTER = 1.15
"""How much faster int8 has to be than float to be worth its rounding."""
SNR_SAMPLES = 64


@dataclass(slots=True)
class Made:
    """Graphs in the best precision of each, and what was found on the way."""

    graphs: Graphs
    precision: dict[str, str]
    rules: Inference
    report: dict[str, Any] = field(default_factory=dict)


def make_int8(
    source: Source,
    graphs: Graphs,
    target: Target,
    recipe: Recipe,
    samples: NDArray[Any],
    max_drop: float,
    latent: str,
    say: Say,
) -> Made:
    """The int8 fleet; DropError when no choice of nodes keeps within `max_drop` points of the float one."""
    reference = System(source, graphs, latent)
    extractor = _Component("extractor", graphs.extractor, target)
    say("calibrating the extractor")
    extractor.calibrate(drawn(samples, recipe), recipe)
    latents = latents_of(source, extractor.int8())
    gates, experts = _small(source, graphs, target, recipe, latents)
    made = _Choice(source, graphs, extractor, gates, experts, target, latent)
    report: dict[str, Any] = {"target": target.name, "speed": made.choose_by_speed()}
    for line in made.slower():
        say(line)
    say("measuring what int8 costs")
    system = made.system()
    rules = system.threshold()
    before = _worth(reference, source.inference, reference, source.inference)
    drop = before - _worth(system, rules, reference, source.inference)
    whole = made.extractor.whole
    report["signal_to_noise_db"] = {} if whole else made.extractor.noise(source, samples[:SNR_SAMPLES])
    reverted: list[dict[str, Any]] = []
    order = ["expert", "gate", *sorted(report["signal_to_noise_db"], key=report["signal_to_noise_db"].get)]
    while drop > max_drop and order:
        node = order.pop(0)
        if not made.back_to_float(node):
            continue
        system = made.system()
        rules = system.threshold()
        drop = before - _worth(system, rules, reference, source.inference)
        reverted.append({"node": node, "drop": drop})
        say(f"{node} back to float: {drop:.2f} points below float")
    if reverted and made.slower_now():
        say("extractor stays in float: with so many nodes back it is no faster")
        system = made.system()
        rules = system.threshold()
        drop = before - _worth(system, rules, reference, source.inference)
    if drop > max_drop:
        raise DropError(f"int8 is {drop:.2f} points worse than float, over the {max_drop:g} of --max-drop")
    report |= {
        "accuracy_float": before,
        "accuracy_int8": before - drop,
        "drop": drop,
        "measured_by": "labels" if source.labels is not None else "agreement with float",
        "gate_agreement": gate_agreement(reference, system),
        "load": {"float": reference.load(), "as written": system.load()},
        "reverted": reverted,
        "fusion": fused(system.graphs.extractor) if target.name != "jetson" else "unmeasured: TensorRT does it",
        "local_first": {"float": source.inference.local_first, "int8": rules.local_first},
        "calibration": {"method": recipe.method, "samples": int(min(len(samples), recipe.samples))},
    }
    return Made(system.graphs, made.precision(), rules, report)


def _worth(system: System, rules: Inference, reference: System, float_rules: Inference) -> float:
    """Percent of right answers; where nobody knows what is right, of those that float gives."""
    if system.source.labels is not None:
        return 100 * system.accuracy(rules)
    return 100 * float((system.answered(rules) == reference.answered(float_rules)).mean())


class _Component:
    """One graph, its ranges, and which of its nodes stay in float."""

    def __init__(self, name: str, graph: bytes, target: Target) -> None:
        self.name, self.graph, self.target = name, graph, target
        self.model = simplified(graph)
        self.floats: list[str] = []
        self.whole = False
        """Whether it stays in float altogether."""
        self._ranges: dict[str, Range] = {}

    def calibrate(self, inputs: NDArray[Any], recipe: Recipe) -> None:
        self._ranges = ranges(self.model, inputs, recipe)

    def int8(self) -> bytes:
        return quantize(self.model, self._ranges, self.target, self.floats)

    def best(self) -> bytes:
        everything = set(quantizable(self.model)) <= set(self.floats)
        return self.graph if self.whole or everything else self.int8()

    def noise(self, source: Source, inputs: NDArray[Any]) -> dict[str, float]:
        """For each node that computes, the latents' power over that of its noise when it alone is int8, in dB."""
        nodes, true = quantizable(self.model), latents_of(source, self.graph, inputs)
        found = {}
        for node in nodes:
            alone = quantize(self.model, self._ranges, self.target, [other for other in nodes if other != node])
            noise = float(((latents_of(source, alone, inputs) - true) ** 2).sum())
            found[node] = round(10 * float(np.log10(max(float((true**2).sum()), 1e-30) / max(noise, 1e-30))), 2)
        return found


def _small(
    source: Source, graphs: Graphs, target: Target, recipe: Recipe, latents: NDArray[np.float32]
) -> tuple[list[_Component], list[_Component]]:
    """Gates and experts, calibrated on the latents that they will receive."""
    gates = [_Component(f"gate {i}", gate, target) for i, gate in enumerate(graphs.gates)]
    experts = [_Component(f"expert {i}", expert, target) for i, expert in enumerate(graphs.experts)]
    if not target.small_graphs:
        for component in (*gates, *experts):
            component.whole = True
        return gates, experts
    for gate in gates:
        gate.calibrate(latents, recipe)
    routed = _routed(source, [gate.int8() for gate in gates], latents)
    for i, expert in enumerate(experts):
        rows = np.flatnonzero(routed == i)
        if source.clients is not None:
            rows = np.union1d(rows, np.flatnonzero(source.clients == i))  # its own, which stay at home
        expert.calibrate(latents[rows] if len(rows) >= recipe.least else latents, recipe)
    return gates, experts


def _routed(source: Source, gates: Sequence[bytes], latents: NDArray[np.float32]) -> NDArray[np.int64]:
    """Whom each sample goes to: by its own client's gate where that is known."""
    dim, experts = (source.latent_dim,), (len(source.experts),)
    favourites = np.stack([in_batches(Graph("gate", gate, dim, experts), latents).argmax(1) for gate in gates])
    owner = source.clients if source.clients is not None and len(gates) > 1 else np.zeros(len(latents), np.int64)
    chosen: NDArray[np.int64] = favourites[owner, np.arange(len(latents))]
    return chosen


class _Choice:
    """Which precision each component has at present."""

    def __init__(
        self,
        source: Source,
        graphs: Graphs,
        extractor: _Component,
        gates: list[_Component],
        experts: list[_Component],
        target: Target,
        latent: str,
    ) -> None:
        self.source, self.floats, self.extractor, self.gates, self.experts = source, graphs, extractor, gates, experts
        self.target, self.latent = target, latent
        self._speed: dict[str, Any] = {}

    def choose_by_speed(self) -> dict[str, Any]:
        """Measure float against int8, one row, one thread; what is no faster in int8 stays in float."""
        if platform.machine() not in self.target.machine:
            self._speed = dict.fromkeys(("extractor", "gate", "expert"), "unmeasured")
            return self._speed
        source, dim = self.source, (self.source.latent_dim,)
        row = latents_of(source, self.floats.extractor, source.inputs[:1])
        asked = (
            ("extractor", [self.extractor], source.input.shape, dim, source.inputs[:1]),
            ("gate", self.gates, dim, (len(self.experts),), row),
            ("expert", self.experts, dim, (source.outputs,), row),
        )
        for name, components, row_in, row_out, rows in asked:
            if components[0].whole:
                continue
            graphs = {"float": components[0].graph, "int8": components[0].int8()}
            took = latencies(graphs, row_in, row_out, rows)
            faster = took["float"] / took["int8"]
            self._speed[name] = {"float_ms": took["float"], "int8_ms": took["int8"], "times_faster": faster}
            for component in components:
                component.whole = faster < FASTER
        return self._speed

    def back_to_float(self, name: str) -> bool:
        """Take a kind of component, or a node of the extractor, back; False where it is in float already."""
        if name in ("expert", "gate"):
            components = self.experts if name == "expert" else self.gates
            changed = not components[0].whole
            for component in components:
                component.whole = True
            return changed
        self.extractor.floats.append(name)
        return True

    def slower_now(self) -> bool:
        """Measure the extractor as it has become; it goes back altogether when that is no faster than float."""
        if self.extractor.whole or not isinstance(self._speed.get("extractor"), dict):
            return False
        source = self.source
        graphs = {"float": self.extractor.graph, "int8": self.extractor.best()}
        took = latencies(graphs, source.input.shape, (source.latent_dim,), source.inputs[:1])
        faster = took["float"] / took["int8"]
        self._speed["extractor"] |= {"float_ms": took["float"], "int8_ms": took["int8"], "times_faster": faster}
        self.extractor.whole = faster < FASTER
        return self.extractor.whole

    def slower(self) -> list[str]:
        """A line for each kind of component that int8 makes no faster."""
        return [
            f"{name} stays in float: int8 is {figures['times_faster']:.2f} times as fast here"
            for name, figures in self._speed.items()
            if isinstance(figures, dict) and figures["times_faster"] < FASTER
        ]

    def system(self) -> System:
        """The fleet in these precisions."""
        best = Graphs(self.extractor.best(), [g.best() for g in self.gates], [e.best() for e in self.experts])
        return System(self.source, best, self.latent)

    def precision(self) -> dict[str, str]:
        """As the manifest says it."""
        parts = {"extractor": self.extractor, "gate": self.gates[0], "expert": self.experts[0]}
        return {name: "fp32" if part.best() is part.graph else "int8" for name, part in parts.items()}
