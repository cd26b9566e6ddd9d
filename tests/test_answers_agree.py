"""The three implementations of "what a device answers" give the same answers.

    training   nmoe_train.results.evaluation.answers, in torch, for all rows at once
    export     nmoe_export.bundles.manifest_accuracy and nmoe_export.simulation.Simulation
    device     nmoe_edge.protocol: route, Exchange and combine, called as device/requests.py calls them

Scores and outputs are random, without ties. The manifest's accuracy ignores local-first answers and the class mix
by design, and so differs from the others where these are in use.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.routing import route
from nmoe_export.bundles import manifest_accuracy
from nmoe_export.simulation import Simulation
from nmoe_train.results.evaluation import DeviceRows, accuracy, answers, apply_class_mix
from nmoe_train.run import Inference

ROWS = 60
EXPERTS = 5
CLASSES = 4
DEVICE = 2
LOCAL_FIRST = 0.8
EVERY_RULE = [
    Inference(top_k, combination, local_first, False)
    for top_k, combination, local_first in itertools.product(
        (1, 2, 3), ("outputs", "probabilities"), (None, LOCAL_FIRST)
    )
]


@pytest.fixture(params=range(3), ids=lambda seed: f"seed{seed}")
def drawn(request):
    """Scores (n, experts) and outputs (n, experts, classes); the own expert is confident for about half of the rows."""
    draw = np.random.default_rng(request.param)
    ranks = draw.permuted(np.tile(np.arange(EXPERTS), (ROWS, 1)), axis=1)
    scores = (0.5 * ranks + draw.uniform(0, 0.4, ranks.shape)).astype(np.float32)  # at least 0.1 apart
    outputs = (2 * draw.normal(size=(ROWS, EXPERTS, CLASSES))).astype(np.float32)
    confidence = softmax(outputs[:, DEVICE]).max(axis=1)
    assert np.abs(confidence - LOCAL_FIRST).min() > 1e-5, "a confidence is at the threshold"
    assert 0.2 < (confidence > LOCAL_FIRST).mean() < 0.8
    return scores, outputs


def answers_of_training(scores, outputs, rules, labels=None):
    """Class probabilities (n, classes), and for each row the experts that answer."""
    labels = np.zeros(len(scores), np.int64) if labels is None else labels
    rows = DeviceRows(*(torch.from_numpy(array.copy()) for array in (scores, outputs, labels)))
    probabilities, shares = answers(rows, DEVICE, rules)
    return probabilities.numpy(), [set(np.flatnonzero(row)) for row in shares.numpy()]


def answers_of_device(scores, outputs, rules):
    """What the exchange of a device returns, (n, classes), and for each row the experts that answer.

    With the combination "outputs" these are the combined outputs, not probabilities.
    """
    local_rows = set()
    if rules.local_first is not None:
        confidence = softmax(outputs[:, DEVICE]).max(axis=1)
        local_rows = set(np.flatnonzero(confidence > rules.local_first).tolist())
    routes = route(scores, DEVICE, range(EXPERTS), rules.top_k, local_rows)
    exchange = Exchange(routes, CLASSES, itertools.count(), deadline=1.0, combination=rules.combination)
    for call in exchange.start(0.0):
        exchange.answered(call.request, call.expert, outputs[list(call.rows), call.expert], 0.5)
    combined, rows = exchange.result()
    return combined, [set(row.experts) for row in rows]


def simulation_of(scores, outputs, labels):
    """A Simulation that holds these arrays in place of what graphs computed. Every row is measured."""
    simulation = object.__new__(Simulation)
    simulation.source = SimpleNamespace(labels=labels, measured_rows=np.arange(len(scores)))
    simulation.graphs = SimpleNamespace(experts=[b""] * EXPERTS)
    simulation.scores = [scores]
    simulation.outputs = outputs
    simulation.latents = np.zeros((len(scores), 1), np.float32)
    return simulation


@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_training_and_device_ask_the_same_experts_and_give_the_same_answers(drawn, rules):
    scores, outputs = drawn
    expected, expected_experts = answers_of_training(scores, outputs, rules)
    combined, experts = answers_of_device(scores, outputs, rules)
    assert experts == expected_experts
    assert np.array_equal(combined.argmax(1), expected.argmax(1))
    probabilities = combined if rules.combination == "probabilities" else softmax(combined)
    assert np.allclose(probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_the_simulation_of_an_export_gives_the_answers_of_a_device(drawn, rules):
    scores, outputs = drawn
    combined, _ = answers_of_device(scores, outputs, rules)
    labels = np.random.default_rng(7).integers(0, CLASSES, ROWS)
    simulation = simulation_of(scores, outputs, labels)
    assert np.array_equal(simulation.answered_classes(rules)[DEVICE], combined.argmax(1))
    assert simulation.accuracies(rules)[DEVICE] == pytest.approx((combined.argmax(1) == labels).mean())


@pytest.mark.parametrize("rules", [rules for rules in EVERY_RULE if rules.local_first is None], ids=str)
def test_the_accuracy_in_a_manifest_is_that_of_training_and_device(drawn, rules):
    scores, outputs = drawn
    answered = answers_of_device(scores, outputs, rules)[0].argmax(1)
    assert manifest_accuracy(simulation_of(scores, outputs, answered), rules, DEVICE, answered) == 1
    labels = np.random.default_rng(7).integers(0, CLASSES, ROWS)
    found = manifest_accuracy(simulation_of(scores, outputs, labels), rules, DEVICE, labels)
    probabilities, _ = answers_of_training(scores, outputs, rules)
    assert found == pytest.approx(accuracy(torch.from_numpy(probabilities), torch.from_numpy(labels)))


@pytest.mark.parametrize("rules", [rules for rules in EVERY_RULE if rules.local_first is not None], ids=str)
def test_the_accuracy_in_a_manifest_ignores_local_first_by_design(drawn, rules):
    scores, outputs = drawn
    without = replace(rules, local_first=None)
    labels = answers_of_device(scores, outputs, without)[0].argmax(1)
    simulation = simulation_of(scores, outputs, labels)
    assert manifest_accuracy(simulation, rules, DEVICE, labels) == 1
    assert simulation.accuracies(rules)[DEVICE] < 1


def test_the_accuracy_in_a_manifest_ignores_the_class_mix_by_design(drawn):
    """Training estimates the mix from half of the rows for the other half. A device estimates it as rows arrive."""
    scores, outputs = drawn
    outputs = outputs + np.array([1.5, 0, 0, 0], np.float32)  # class 0 is common enough to change answers
    plain = Inference(2, "probabilities", None, False)
    adapting = replace(plain, adapt=True)
    labels = answers_of_device(scores, outputs, plain)[0].argmax(1)
    simulation = simulation_of(scores, outputs, labels)
    assert manifest_accuracy(simulation, adapting, DEVICE, labels) == 1
    without_mix, experts = answers_of_training(scores, outputs, plain)
    with_mix, same_experts = answers_of_training(scores, outputs, adapting)
    assert same_experts == experts
    assert np.array_equal(with_mix, apply_class_mix(torch.from_numpy(without_mix), adapting).numpy())
    assert not np.array_equal(with_mix.argmax(1), without_mix.argmax(1))
