from __future__ import annotations

import itertools

import numpy as np
import pytest

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.answering import AnswerRules, answer, answer_adapted, local_rows
from nmoe_edge.protocol.classmix import cross_adapted
from nmoe_edge.protocol.combine import combine, expert_weights, softmax
from nmoe_edge.protocol.routing import route

ROWS, EXPERTS, CLASSES, OWN = 300, 6, 4, 2
EVERY_RULE = [
    AnswerRules(top_k, combination, local_first, familiar)
    for top_k, combination, local_first, familiar in itertools.product(
        (1, 2, 6), ("outputs", "probabilities"), (None, 0.8), (None, 1.0)
    )
]


def drawn(seed=0, rows=ROWS):
    """Scores with many ties, outputs and distances."""
    random = np.random.default_rng(seed)
    scores = np.round(random.normal(size=(rows, EXPERTS)), 1).astype(np.float32)
    outputs = (2 * random.normal(size=(rows, EXPERTS, CLASSES))).astype(np.float32)
    return scores, outputs, 2 * random.random(rows)


def one_by_one(scores, outputs, rules, distances):
    """What a device does with each row, by route and combine; and the rows it answers alone."""
    confidence = softmax(outputs[:, OWN]).max(axis=1)
    local = confidence > (1.0 if rules.local_first is None else rules.local_first)
    if rules.familiar is not None:
        local &= distances <= rules.familiar
    routes = route(scores, OWN, range(EXPERTS), rules.top_k, set(np.flatnonzero(local).tolist()))
    combined = [
        combine({e: outputs[row, e] for e in experts}, expert_weights(scores[row], experts), rules.combination)
        for row, experts in enumerate(routes.chosen)
    ]
    p = np.stack(combined) if rules.combination == "probabilities" else softmax(np.stack(combined))
    return p, routes.chosen, local


@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_many_rows_are_answered_as_a_device_answers_each(rules):
    scores, outputs, distances = drawn()
    expected, chosen, local = one_by_one(scores, outputs, rules, distances)
    found = answer(scores, outputs, OWN, rules, distances)
    assert np.array_equal(found.local, local)
    assert [set(np.flatnonzero(row)) for row in found.routed] == [set(experts) for experts in chosen]
    assert found.routed.sum(axis=1) == pytest.approx(np.ones(ROWS))
    assert found.p.dtype == np.float32
    assert np.array_equal(found.p, expected.astype(np.float32))


def test_answers_do_not_depend_on_how_many_rows_come_together():
    scores, outputs, distances = drawn(rows=9000)
    rules = AnswerRules(3, "probabilities", 0.7, 1.0)
    together = answer(scores, outputs, OWN, rules, distances).p
    parts = [
        answer(scores[i : i + 1000], outputs[i : i + 1000], OWN, rules, distances[i : i + 1000]).p
        for i in range(0, 9000, 1000)
    ]
    assert np.array_equal(together, np.concatenate(parts))


def test_no_rows_are_answered_by_no_rows():
    scores, outputs, distances = drawn(rows=0)
    found = answer_adapted(scores, outputs, OWN, AnswerRules(2, "outputs", 0.5, 1.0, adapt=True), distances)
    assert (found.p.shape, found.routed.shape, found.local.shape) == ((0, CLASSES), (0, EXPERTS), (0,))


def test_a_confident_row_that_is_not_familiar_goes_where_the_gate_sends_it():
    outputs = np.array([[9.0, 0.0], [9.0, 0.0], [0.0, 0.0], [9.0, 0.0]])
    distances = np.array([1.0, 1.1, 0.0, np.nan])
    assert local_rows(outputs, AnswerRules(1, "outputs", 0.9, 1.0), distances).tolist() == [True, False, False, False]
    assert local_rows(outputs, AnswerRules(1, "outputs", 0.9), distances).tolist() == [True, True, False, True]
    assert not local_rows(outputs, AnswerRules(1, "outputs", None, 1.0), distances).any()


def test_a_novelty_test_without_distances_is_refused():
    with pytest.raises(LocalProtocolError, match="no distances"):
        local_rows(np.zeros((1, 2)), AnswerRules(1, "outputs", 0.9, 1.0))


def test_the_class_mix_is_applied_where_the_rules_adapt():
    scores, outputs, _ = drawn()
    outputs = outputs + np.array([1.5, 0, 0, 0], np.float32)
    plain = answer_adapted(scores, outputs, OWN, AnswerRules(2, "outputs"))
    adapted = answer_adapted(scores, outputs, OWN, AnswerRules(2, "outputs", adapt=True), seed=3)
    assert np.array_equal(plain.p, answer(scores, outputs, OWN, AnswerRules(2, "outputs")).p)
    assert np.array_equal(adapted.p, cross_adapted(plain.p, 3))
    assert not np.array_equal(adapted.p, plain.p)


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": 0},
        {"combination": "mean"},
        {"local_first": 1.1},
        {"local_first": float("nan")},
        {"familiar": -1.0},
        {"familiar": float("nan")},
        {"familiar": float("inf")},
    ],
    ids=str,
)
def test_rules_out_of_range_are_refused(bad):
    with pytest.raises(LocalProtocolError):
        AnswerRules(**({"top_k": 1, "combination": "outputs"} | bad))


@pytest.mark.parametrize(("own", "top_k"), [(-1, 1), (EXPERTS, 1), (0, EXPERTS + 1)])
def test_an_own_expert_or_top_k_outside_the_fleet_is_refused(own, top_k):
    scores, outputs, _ = drawn(rows=2)
    with pytest.raises(LocalProtocolError):
        answer(scores, outputs, own, AnswerRules(top_k, "outputs"))
