from __future__ import annotations

import numpy as np

from nmoe_edge.protocol.answering import AnswerRules
from nmoe_edge.protocol.thresholds import THRESHOLDS, LabelledRows, accuracy, choose_local_first

RULES = AnswerRules(1, "outputs")
N, EXPERTS, CLASSES = 200, 2, 2


def rows(own_right, gate_right, confidence):
    """Rows of device 0: its own expert and the one that the gate prefers are right in these shares."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, N)
    scores = np.tile(np.array([0.0, 1.0], np.float32), (N, 1))
    logit = np.log(confidence / (1 - confidence))
    outputs = np.zeros((N, EXPERTS, CLASSES), np.float32)
    for expert, share in enumerate((own_right, gate_right)):
        said = np.where(random.random(N) < share, labels, 1 - labels)
        outputs[np.arange(N), expert, said] = logit
    return LabelledRows(0, scores, outputs, labels)


def test_the_gate_decides_alone_where_the_own_expert_is_worse():
    part = [rows(0.2, 1.0, 0.999)]
    assert choose_local_first(part, part, RULES) is None


def test_most_rows_stay_local_where_the_own_expert_is_better():
    part = [rows(1.0, 0.5, 0.999)]
    assert choose_local_first(part, part, RULES) == THRESHOLDS[0]


def test_a_threshold_that_lowers_the_accuracy_on_pooled_rows_is_not_taken():
    own, pooled = [rows(1.0, 0.5, 0.999)], [rows(0.6, 0.7, 0.999)]
    total = accuracy(own[0], AnswerRules(1, "outputs", 0.5)) + accuracy(pooled[0], AnswerRules(1, "outputs", 0.5))
    assert total > accuracy(own[0], RULES) + accuracy(pooled[0], RULES)
    assert choose_local_first(own, pooled, RULES) is None


def test_of_equals_the_threshold_that_keeps_most_rows_local_is_taken():
    part = [rows(1.0, 1.0, 0.75)]
    assert choose_local_first(part, part, RULES) == THRESHOLDS[0]


def test_accuracy_is_the_share_of_right_answers():
    part = rows(1.0, 0.5, 0.9)
    assert accuracy(part, AnswerRules(1, "outputs", 0.8)) == 1
    assert 0.4 < accuracy(part, RULES) < 0.6
