"""Float graphs -> the int8 or float16 graphs that are worth it: measured, and put back to float where they lose.

Everything that is said of them is measured on samples that neither calibrated them nor chose their threshold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_export.assignment import KINDS, Assignment, speed_of
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import GREATEST, Candidate
from nmoe_export.errors import DropError, GraphError
from nmoe_export.fusion import fusion
from nmoe_export.progress import Count, Say
from nmoe_export.samples import Samples
from nmoe_export.simulation import Graphs, Simulation, gate_agreement
from nmoe_export.source import Source
from nmoe_export.targets import Target
from nmoe_train.run import Inference

SNR_SAMPLES = 64
MOST_LOOKED_AT = 1024
"""Samples that float16 is tried for size with."""


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
    samples: Samples,
    max_drop: float,
    latent: str,
    say: Say,
) -> Made:
    """The int8 fleet; DropError when no choice of nodes keeps within `max_drop` points of the float one."""
    reference = Simulation(source, graphs, latent)
    say("calibrating")
    choice = Assignment(source, graphs, target, recipe, samples, latent)
    choice.choose_by_speed()
    for line in choice.slower():
        say(line)
    say("measuring what int8 costs")
    trial = _Trial(reference, choice.system())
    whole = choice.extractor.whole
    noise = {} if whole else choice.extractor.noise(source, samples.inputs[:SNR_SAMPLES], say)
    back = _Back(choice, reference, max_drop, say)
    trial = back.until_it_holds(trial, ["expert", "gate", *sorted(noise, key=lambda node: noise[node])])
    report: dict[str, Any] = {
        "target": target.name,
        "speed": choice.speed,
        "signal_to_noise_db": noise,
        "reverted": back.reverted,
        "tried_again": back.again,
        "fusion": _fusion(choice, say),
        "calibration": {"method": recipe.method, "samples": len(samples.inputs)},
    }
    return Made(trial.system.graphs, choice.precision(), trial.rules, report | trial.report())


def make_fp16(source: Source, graphs: Graphs, target: Target, max_drop: float, latent: str, say: Say) -> Made:
    """The float16 fleet; DropError when it is further than `max_drop` points below the float one."""
    reference = Simulation(source, graphs, latent)
    kinds = {"extractor": [graphs.extractor], "gate": graphs.gates, "expert": graphs.experts}
    half = {
        kind: [Candidate(f"{kind} {i}", graph, target, "fp16") for i, graph in enumerate(members)]
        for kind, members in kinds.items()
    }
    say("looking for numbers that float16 has not")
    every = max(1, len(source.inputs) // MOST_LOOKED_AT)
    for kind, members in half.items():
        for component in members:
            # onnxruntime's CPU provider keeps what it computes in float32, so no accuracy would show it here.
            component.calibrate((source.inputs if kind == "extractor" else reference.latents)[::every], Recipe(least=1))
            if not component.fits():
                what = f"numbers inside it go to {component.greatest:.3g}, over the {GREATEST:.0f} of float16"
                raise GraphError(f"{component.name}: {what}; export with --fp32")
    say("measuring what float16 costs")
    made = [[component.best() for component in half[kind]] for kind in KINDS]
    system = Simulation(source, Graphs(made[0][0], made[1], made[2]), latent)
    trial = _Trial(reference, system)
    if trial.drop > max_drop:
        raise DropError(f"float16 is {trial.drop:.2f} points worse than float, over the {max_drop:g} of --max-drop")
    speed = {kind: speed_of(source, kind, half[kind][0], system.latents[:1]) for kind in KINDS}
    return Made(system.graphs, dict.fromkeys(KINDS, "fp16"), trial.rules, {"speed": speed} | trial.report())


class _Trial:
    """A fleet beside the float one."""

    def __init__(self, reference: Simulation, system: Simulation) -> None:
        self.reference, self.system, self.rules = reference, system, system.threshold()
        rules = reference.source.inference
        self._before = _worth(reference, rules, reference, rules)
        self._lost = self._before - _worth(system, self.rules, reference, rules)
        self.drop = float(self._lost.mean())

    def report(self) -> dict[str, Any]:
        """What is to be said of it."""
        source, worst = self.system.source, int(self._lost.argmax())
        return {
            "accuracy_float": float(self._before.mean()),
            "accuracy_written": float(self._before.mean()) - self.drop,
            "drop": self.drop,
            "worst": {"device": f"device-{worst:02}", "drop": float(self._lost[worst])},
            "measured_by": "labels" if source.labels is not None else "agreement with float",
            "measured_samples": len(source.measured),
            "gate_agreement": gate_agreement(self.reference, self.system),
            "load": {"float": self.reference.load(), "written": self.system.load()},
            "local_first": {"float": source.inference.local_first, "written": self.rules.local_first},
        }


def _worth(system: Simulation, rules: Inference, reference: Simulation, float_rules: Inference) -> NDArray[np.float64]:
    """Each device's percent of right answers; where nobody knows what is right, of those that float gives."""
    if system.source.labels is not None:
        return 100 * np.array(system.accuracies(rules))
    share: NDArray[np.float64] = (system.answered(rules) == reference.answered(float_rules)).mean(1)
    return 100 * share


class _Back:
    """Graphs and nodes that go back to float, one after another."""

    def __init__(self, choice: Assignment, reference: Simulation, max_drop: float, say: Say) -> None:
        self._choice, self._reference, self._max_drop, self._say = choice, reference, max_drop, say
        self.reverted: list[dict[str, Any]] = []
        """Each with the drop after it went back."""
        self.again: list[str] = []
        """Those that are int8 again, since their going back helped nothing."""

    def until_it_holds(self, trial: _Trial, order: list[str]) -> _Trial:
        """The trial that is within what is allowed; DropError where there is none."""
        for name in order:
            if trial.drop <= self._max_drop:
                break
            trial = self._without(name, trial)
        trial = self._retried(trial)
        if self.reverted and self._choice.slower_now():
            self._say("extractor stays in float: with so many nodes back it is no faster")
            trial = self._tried()
            for name in ("expert", "gate"):
                trial = trial if trial.drop <= self._max_drop else self._without(name, trial)
        if trial.drop > self._max_drop:
            raise DropError(
                f"int8 is {trial.drop:.2f} points worse than float, over the {self._max_drop:g} of --max-drop"
            )
        return trial

    def _without(self, name: str, trial: _Trial) -> _Trial:
        if not self._choice.back_to_float(name):
            return trial
        trial = self._tried()
        self.reverted.append({"node": name, "drop": trial.drop})
        self._say(f"{name} back to float: {trial.drop:.2f} points below float")
        return trial

    def _retried(self, trial: _Trial) -> _Trial:
        """What went back before the one that made it hold may have done no good: each is tried in int8 again."""
        earlier = [entry["node"] for entry in self.reverted[:-1]] if trial.drop <= self._max_drop else []
        for number, name in enumerate(earlier, 1):
            self._choice.again(name)
            tried = self._tried()
            if tried.drop <= self._max_drop:
                trial = tried
                self.again.append(name)
            else:
                self._choice.back_to_float(name)
            self._say(Count("{} tried in int8 again", number, len(earlier)))
        self.reverted = [entry for entry in self.reverted if entry["node"] not in self.again]
        return trial

    def _tried(self) -> _Trial:
        return _Trial(self._reference, self._choice.system())


def _fusion(choice: Assignment, say: Say) -> dict[str, Any]:
    """The proof that the extractor computes in integers, where onnxruntime's CPU provider runs it."""
    extractor = choice.extractor
    if choice.target.name == "jetson":
        return {"unmeasured": "TensorRT does it"}
    if extractor.precision() != "int8" or extractor.model is None:
        return {"unmeasured": "the extractor stays in float"}
    found = fusion(extractor.best(), extractor.model, extractor.left_float())
    missing = found.missing()
    if missing:
        say(missing)
    return asdict(found) | {"missing": missing}
