"""What each device's bundle holds: its manifest, its graphs, and the self-test that another machine repeats."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import SCHEMA, STATISTICS, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, trunk_digest
from nmoe_edge.bundle.selftest import SelfTest
from nmoe_edge.bundle.statistics import write_statistics
from nmoe_edge.protocol.routing import route
from nmoe_export.errors import SourceError
from nmoe_export.graphs import IR_VERSION, OPSET
from nmoe_export.search import Chosen
from nmoe_export.simulation import expert_session
from nmoe_export.source import Source

SELFTEST_ROWS = 8
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 2e-2}
"""How much another machine may differ, as a share of the largest value in the self-test. float32 sums in another order
differ by 1e-6. float16 hardware differs from a CPU that computes in float32 by 2e-3, for a ResNet18. An int8 value that
is rounded the other way differs by 1/127."""


def device_bundle(
    source: Source, chosen: Chosen, target: str, latent: str, device: int
) -> tuple[Manifest, dict[str, bytes]]:
    """A device's manifest, and the contents of its files by name.

    `target` is the profile that the graphs are made for, or "any"; `latent` is the type that latents travel as.
    Raises SourceError when the fleet exceeds a limit of bundles.
    """
    graphs = chosen.simulation.graphs
    contents = {
        "extractor.onnx": graphs.extractor,
        "gate.onnx": graphs.gates[device % len(graphs.gates)],
        "expert.onnx": graphs.experts[device],
        "selftest.npz": _selftest(source, chosen, device).write(),
    }
    if source.names is not None:
        contents["labels.txt"] = ("\n".join(source.names) + "\n").encode()
    if chosen.rules.familiar is not None and source.familiar is not None:
        contents[STATISTICS] = write_statistics(source.familiar[device])
    try:
        return _manifest(source, chosen, target, latent, device), contents
    except ValueError as error:
        raise SourceError(f"device {device} does not fit in a bundle: {error}") from error


def _manifest(source: Source, chosen: Chosen, target: str, latent: str, device: int) -> Manifest:
    """ValueError when the fleet exceeds a limit of bundles, such as the number of experts."""
    rules = chosen.rules
    accuracy: dict[str, float] = {}
    if source.labels is not None:
        accuracy[source.samples] = chosen.simulation.accuracy(device, rules)
    experts = len(source.experts)
    return Manifest(
        schema=SCHEMA,
        device=f"device-{device:02}",
        experts=experts,
        expert=device,
        outputs=source.outputs,
        answers_carry_prior=source.answers_carry_prior,
        input=source.input,
        latent=LatentSpec(source.latent_dim, latent),  # type: ignore[arg-type]  # one of the options
        routing=RoutingSpec(**asdict(rules)),
        precision=PrecisionSpec(**chosen.precision),  # type: ignore[arg-type]  # its keys are KINDS
        target=target,  # type: ignore[arg-type]  # one of the targets, or any
        opset=OPSET,
        ir_version=IR_VERSION,
        accuracy=accuracy,
        extractor_source=source.extractor_source,
        trunk=trunk_digest(source.extractor_source, source.latent_dim, experts, source.outputs),
    )


def _selftest(source: Source, chosen: Chosen, device: int) -> SelfTest:
    """Samples with the latents, routes and outputs that this machine computes for them."""
    simulation = chosen.simulation
    scores = simulation.scores_of(device)
    rows = _clear_rows(scores, chosen.rules.top_k)
    routes = route(scores[rows], device, range(scores.shape[1]), chosen.rules.top_k).chosen
    latents = simulation.latents[rows]
    # Of the latents themselves, not as they travel.
    outputs = expert_session(source, simulation.graphs.experts[device])(latents)
    tolerance = max(TOLERANCES[precision] for precision in chosen.precision.values())
    return SelfTest(
        source.inputs[rows],
        latents,
        np.array(routes, np.int64),
        outputs,
        np.array(tolerance * max(1.0, float(np.abs(latents).max()))),
        np.array(tolerance * max(1.0, float(np.abs(outputs).max()))),
    )


def _clear_rows(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """The samples of the self-test: the clearest route to each expert, then the second clearest to each, and so on.

    They come from the clearer half of all routes, so that a last bit of another CPU does not choose another expert.
    """
    ranked = -np.sort(-scores, axis=1)[:, : top_k + 1]
    gaps = ranked[:, :-1] - ranked[:, 1:]  # between the chosen experts too: their order counts
    margin = gaps.min(axis=1, initial=np.inf)
    clear = np.argsort(-margin, kind="stable")[: max(SELFTEST_ROWS, len(margin) // 2)]
    seen = Counter[int]()
    rounds = []
    for favourite in scores[clear].argmax(axis=1).tolist():
        rounds.append(seen[favourite])
        seen[favourite] += 1
    return clear[np.argsort(rounds, kind="stable")[:SELFTEST_ROWS]]
