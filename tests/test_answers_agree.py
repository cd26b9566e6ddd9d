"""What a device answers, computed three ways, is the same.

    training, export   nmoe_edge.protocol.answering.answer, for all rows at once
    export             nmoe_export.simulation.Simulation, which also gives the manifest its accuracy
    device             nmoe_edge.protocol: local_rows, route, Exchange and combine, as requests.py calls them

Scores and outputs are random, without ties.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nmoe_edge.protocol.answering import AnswerRules, answer, local_rows
from nmoe_edge.protocol.classmix import MIN_ROWS, ClassMix, cross_adapted
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.familiar import Familiar
from nmoe_edge.protocol.routing import route
from nmoe_export.simulation import Simulation

ROWS = 60
EXPERTS = 5
CLASSES = 4
DIM = 3
DEVICE = 2
LOCAL_FIRST = 0.8
FAMILIAR = 2.0
EVERY_RULE = [
    AnswerRules(top_k, combination, local_first, familiar)
    for top_k, combination, (local_first, familiar) in itertools.product(
        (1, 2, 3), ("outputs", "probabilities"), ((None, None), (LOCAL_FIRST, None), (LOCAL_FIRST, FAMILIAR))
    )
]
STATISTICS = [
    Familiar(np.eye(DIM, dtype=np.float32), np.full((1, DIM), device / 10, np.float32)) for device in range(EXPERTS)
]


@pytest.fixture(params=range(3), ids=lambda seed: f"seed{seed}")
def drawn(request):
    """Scores, outputs and latents; the own expert is confident for about half of the rows, and knows about half."""
    draw = np.random.default_rng(request.param)
    ranks = draw.permuted(np.tile(np.arange(EXPERTS), (ROWS, 1)), axis=1)
    scores = (0.5 * ranks + draw.uniform(0, 0.4, ranks.shape)).astype(np.float32)  # at least 0.1 apart
    outputs = (2 * draw.normal(size=(ROWS, EXPERTS, CLASSES))).astype(np.float32)
    latents = draw.normal(size=(ROWS, DIM)).astype(np.float32)
    confidence = softmax(outputs[:, DEVICE]).max(axis=1)
    distances = STATISTICS[DEVICE].distances(latents)
    assert np.abs(confidence - LOCAL_FIRST).min() > 1e-5, "a confidence is at the threshold"
    assert 0.2 < (confidence > LOCAL_FIRST).mean() < 0.8
    assert 0.2 < (distances <= FAMILIAR).mean() < 0.8
    return scores, outputs, latents


def answers_of_device(scores, outputs, latents, rules):
    """What the exchange of a device returns, (n, classes), and for each row the experts that answer.

    With the combination "outputs" these are the combined outputs, not probabilities.
    """
    local = local_rows(outputs[:, DEVICE], rules, STATISTICS[DEVICE].distances(latents))
    routes = route(scores, DEVICE, range(EXPERTS), rules.top_k, set(np.flatnonzero(local).tolist()))
    exchange = Exchange(routes, CLASSES, itertools.count(), deadline=1.0, combination=rules.combination)
    for call in exchange.start(0.0):
        exchange.answered(call.request, call.expert, outputs[list(call.rows), call.expert], 0.5)
    combined, rows = exchange.result()
    return combined, [set(row.experts) for row in rows]


def probabilities_of(combined, rules):
    return combined if rules.combination == "probabilities" else softmax(combined).astype(np.float32)


def simulation_of(scores, outputs, latents, labels):
    """A Simulation that holds these arrays in place of what graphs computed. Every row is measured."""
    simulation = object.__new__(Simulation)
    simulation.source = SimpleNamespace(labels=labels, measured_rows=np.arange(len(scores)), familiar=STATISTICS)
    simulation.graphs = SimpleNamespace(experts=[b""] * EXPERTS)
    simulation.scores = [scores]
    simulation.outputs = outputs
    simulation.latents = latents
    return simulation


@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_many_rows_at_once_get_the_answers_of_a_device(drawn, rules):
    scores, outputs, latents = drawn
    combined, experts = answers_of_device(scores, outputs, latents, rules)
    found = answer(scores, outputs, DEVICE, rules, STATISTICS[DEVICE].distances(latents))
    assert [set(np.flatnonzero(row)) for row in found.routed] == experts
    assert np.array_equal(found.p, probabilities_of(combined, rules))


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_the_accuracy_in_a_manifest_is_that_of_the_answers_of_a_device(drawn, rules, adapt):
    scores, outputs, latents = drawn
    outputs = outputs + np.array([1.5, 0, 0, 0], np.float32)  # class 0 is common enough to change answers
    combined, _ = answers_of_device(scores, outputs, latents, rules)
    p = probabilities_of(combined, rules)
    answered = (cross_adapted(p, 0) if adapt else p).argmax(1)
    labels = np.random.default_rng(7).integers(0, CLASSES, ROWS)
    simulation = simulation_of(scores, outputs, latents, labels)
    rules = replace(rules, adapt=adapt)
    assert np.array_equal(simulation.answered_classes(rules)[DEVICE], answered)
    assert simulation.accuracy(DEVICE, rules) == simulation.accuracies(rules)[DEVICE] == (answered == labels).mean()


def test_an_evaluation_gives_half_of_the_rows_the_mix_that_a_device_learns_from_the_others():
    draw = np.random.default_rng(0)
    p = softmax(2 * draw.normal(size=(2 * MIN_ROWS, CLASSES)) + np.array([2.0, 0, 0, 0])).astype(np.float32)
    factors = cross_adapted(p, seed=0) / p
    mixes = factors / factors.sum(axis=1, keepdims=True)  # (n, classes): the mix that each row was multiplied by
    half = np.isclose(mixes, mixes[0], rtol=1e-4).all(axis=1)
    assert half.sum() == MIN_ROWS
    device = ClassMix(CLASSES)
    device.reweight(p[~half])
    assert device.mix == pytest.approx(mixes[0], rel=1e-3)
