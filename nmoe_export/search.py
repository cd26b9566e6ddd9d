"""The search for precisions: float graphs -> candidates -> measured -> chosen.

`search_int8` and `search_fp16` read from top to bottom. What a graph becomes when it is reduced is up to candidate.py;
what accuracy it costs is measured by trial.py.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nmoe_edge.common.progress import Count, Progress
from nmoe_edge.protocol.answering import AnswerRules
from nmoe_export.assignment import Assignment, Candidates
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import FLOAT16_MAX, Candidate
from nmoe_export.errors import DropError, GraphError
from nmoe_export.fusion import fusion
from nmoe_export.samples import Samples
from nmoe_export.simulation import KINDS, Graphs, Simulation
from nmoe_export.source import Source
from nmoe_export.speed import FASTER, compare_speed
from nmoe_export.targets import Target
from nmoe_export.trial import Trial

SNR_SAMPLES = 64
"""Samples that measure how noisy each node is in int8."""
MAX_RANGE_SAMPLES = 1024
"""Samples that are searched for values float16 cannot represent."""

Measure = Callable[[Assignment], Trial]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The graphs to write, and what was found on the way to them."""

    simulation: Simulation
    """Holds the graphs and what they computed for the source's samples."""
    precision: dict[str, str]
    """The precision of each kind of graph, as the manifest has it."""
    rules: AnswerRules
    report: dict[str, Any] = field(default_factory=dict)
    """The search's part of report.json."""


def search_int8(
    source: Source,
    graphs: Graphs,
    target: Target,
    recipe: Recipe,
    samples: Samples,
    max_drop: float,
    latent: str,
    progress: Progress,
) -> Chosen:
    """Find the int8 fleet that is faster than the float `graphs` and at most `max_drop` points less accurate.

    A kind of graph that int8 does not make faster stays in float. Then experts, gates and the extractor's nodes, the
    noisiest first, go back to float one after another until the drop is allowed. Raises DropError when it never is.
    """
    reference = Simulation(source, graphs, latent)
    candidates = Candidates(source, graphs, target, recipe, samples)

    def measure(assignment: Assignment) -> Trial:
        simulation = Simulation(source, candidates.graphs(assignment), latent)
        return Trial(reference, simulation, assignment, candidates.precision(assignment))

    progress("calibrating")
    assignment, speed = _choose_by_speed(candidates, progress)

    progress("measuring what int8 costs")
    trial = measure(assignment)
    snr_db: dict[str, float] = {}
    if not assignment.is_float("extractor"):
        snr_db = candidates.extractor.snr_db(source, samples.inputs[:SNR_SAMPLES], progress)

    noisiest_first = sorted(snr_db, key=lambda node: snr_db[node])
    trial, reverted = _back_to_float(trial, ["expert", "gate", *noisiest_first], max_drop, measure, progress)
    trial, tried_again = _int8_again(trial, reverted, max_drop, measure, progress)
    reverted = [entry for entry in reverted if entry["node"] not in tried_again]

    timing = _extractor_timing(candidates, trial.assignment) if reverted else None
    if timing is not None:
        speed["extractor"] = timing
    if timing is not None and timing["times_faster"] < FASTER:
        progress("extractor stays in float: with so many nodes in float it is not faster")
        trial = measure(trial.assignment.with_float("extractor"))
        trial, more = _back_to_float(trial, ["expert", "gate"], max_drop, measure, progress)
        reverted += more

    _check_drop("int8", trial, max_drop)
    report = {
        "target": target.name,
        "speed": speed,
        "signal_to_noise_db": snr_db,
        "reverted": reverted,
        "tried_again": tried_again,
        "fusion": _fusion(candidates, trial, progress),
        "calibration": {"method": recipe.method, "samples": len(samples.inputs)},
    }
    return Chosen(trial.simulation, trial.precision, trial.rules, report | trial.report())


def search_fp16(
    source: Source, graphs: Graphs, target: Target, max_drop: float, latent: str, progress: Progress
) -> Chosen:
    """Convert every graph to float16, whether or not that is faster on this machine.

    Raises GraphError when a value inside a graph is too large for float16, and DropError when the fleet is more than
    `max_drop` points less accurate than the float one.
    """
    reference = Simulation(source, graphs, latent)

    progress("looking for values float16 cannot represent")
    # onnxruntime's CPU provider computes float16 graphs in float32, so a measured accuracy would not show an overflow.
    stride = max(1, len(source.inputs) // MAX_RANGE_SAMPLES)
    halved: dict[str, list[bytes]] = {}
    for kind in KINDS:
        inputs = source.inputs if kind == "extractor" else reference.latents
        halved[kind] = []
        for number, graph in enumerate(graphs.of_kind(kind)):
            name = "extractor" if kind == "extractor" else f"{kind} {number}"
            candidate = Candidate(name, graph, target, "fp16")
            candidate.calibrate(inputs[::stride], Recipe(least=1))
            _check_float16(candidate)
            halved[kind].append(candidate.reduced_graph())

    progress("measuring what float16 costs")
    simulation = Simulation(source, Graphs(halved["extractor"][0], halved["gate"], halved["expert"]), latent)
    trial = Trial(reference, simulation, Assignment(), dict.fromkeys(KINDS, "fp16"))
    _check_drop("float16", trial, max_drop)
    latent_row = simulation.latents[:1]
    speed = {kind: compare_speed(source, kind, graphs.of_kind(kind)[0], halved[kind][0], latent_row) for kind in KINDS}
    return Chosen(simulation, trial.precision, trial.rules, {"speed": speed} | trial.report())


def _choose_by_speed(candidates: Candidates, progress: Progress) -> tuple[Assignment, dict[str, Any]]:
    """Keep in float every kind that int8 does not make faster. Returns the timings too, by kind.

    The kinds follow each other, because gates are calibrated on what the extractor becomes and experts on both.
    """
    assignment = Assignment()
    speed: dict[str, Any] = {}
    for kind in KINDS:
        candidates.calibrate(kind, assignment)
        if not all(candidate.fits() for candidate in candidates.of_kind(kind)):
            progress(f"{kind} stays in float32: values inside it are too large for float16")
            assignment = assignment.with_float(kind)
            continue
        timing = _timing(kind, candidates, assignment)
        speed[kind] = "unmeasured" if timing is None else timing
        if timing is not None and timing["times_faster"] < FASTER:
            progress(f"{kind} stays in float: int8 is {timing['times_faster']:.2f} times as fast here")
            assignment = assignment.with_float(kind)
    return assignment, speed


def _timing(kind: str, candidates: Candidates, assignment: Assignment) -> dict[str, float] | None:
    """The speed of a kind's first graph against float; None where this machine cannot measure the target.

    The other graphs of a kind are built alike.
    """
    if platform.machine() not in candidates.target.machine:
        return None
    source = candidates.source
    candidate = candidates.of_kind(kind)[0]
    reduced = candidate.reduced_graph(assignment.float_nodes(kind))
    no_latent = np.zeros((1, source.latent_dim), np.float32)  # the extractor is timed on a sample instead
    latent = no_latent if kind == "extractor" else candidates.latents(assignment)[:1]
    return compare_speed(source, kind, candidate.graph, reduced, latent)


def _extractor_timing(candidates: Candidates, assignment: Assignment) -> dict[str, float] | None:
    """The speed of the int8 extractor with some nodes back in float; None where it is float or cannot be measured."""
    return None if assignment.is_float("extractor") else _timing("extractor", candidates, assignment)


def _back_to_float(
    trial: Trial, parts: Sequence[str], max_drop: float, measure: Measure, progress: Progress
) -> tuple[Trial, list[dict[str, Any]]]:
    """Put `parts` back in float, one after another, until the drop is allowed.

    Returns the last trial, and each part with the drop after it went back.
    """
    reverted: list[dict[str, Any]] = []
    for part in parts:
        if trial.drop <= max_drop:
            break
        if trial.assignment.is_float(part):
            continue
        trial = measure(trial.assignment.with_float(part))
        reverted.append({"node": part, "drop": trial.drop})
        progress(f"{part} back to float: {trial.drop:.2f} points below float")
    return trial, reverted


def _int8_again(
    trial: Trial, reverted: Sequence[dict[str, Any]], max_drop: float, measure: Measure, progress: Progress
) -> tuple[Trial, list[str]]:
    """Of the parts put back in float, try all but the last in int8 again.

    Returns the last allowed trial, and the parts that are int8 in it again.
    """
    if trial.drop > max_drop:
        return trial, []
    earlier = [entry["node"] for entry in reverted[:-1]]
    succeeded: list[str] = []
    for number, part in enumerate(earlier, 1):
        attempt = measure(trial.assignment.without_float(part))
        if attempt.drop <= max_drop:
            trial = attempt
            succeeded.append(part)
        progress(Count("{} tried in int8 again", number, len(earlier)))
    return trial, succeeded


def _check_drop(precision: str, trial: Trial, max_drop: float) -> None:
    if trial.drop > max_drop:
        raise DropError(
            f"{precision} is {trial.drop:.2f} points worse than float, and --max-drop allows {max_drop:g}:"
            " allow more, or export with --fp32"
        )


def _check_float16(candidate: Candidate) -> None:
    if not candidate.fits():
        raise GraphError(
            f"{candidate.name}: values inside it reach {candidate.largest:.3g}, over the {FLOAT16_MAX:.0f} of float16;"
            " export with --fp32"
        )


def _fusion(candidates: Candidates, trial: Trial, progress: Progress) -> dict[str, Any]:
    """Count what the chosen extractor computes in integers on onnxruntime's CPU provider."""
    if candidates.target.name == "jetson":
        return {"unmeasured": "TensorRT fuses on the board; not counted here"}
    model = candidates.extractor.model
    if trial.precision["extractor"] != "int8" or model is None:
        return {"unmeasured": "the extractor stays in float"}
    in_float = candidates.extractor.nodes_in_float(trial.assignment.nodes)
    counts = fusion(trial.simulation.graphs.extractor, model, in_float)
    missing = counts.missing()
    if missing:
        progress(missing)
    return asdict(counts) | {"missing": missing}
