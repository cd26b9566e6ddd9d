from __future__ import annotations

import numpy as np
import pytest

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.combine import combine, expert_weights, softmax
from nmoe_edge.protocol.routing import route

SCORES = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 0.0, -1.0]], np.float32)


def test_rows_go_to_their_top_k_experts_best_first():
    assert route(SCORES, 0, range(4), 2).chosen == ((1, 3), (0, 1))


def test_of_equal_scores_the_lower_number_wins():
    assert route(np.zeros((1, 5)), 0, range(5), 3).chosen == ((0, 1, 2),)


def test_an_expert_that_is_not_alive_is_wanted_but_not_chosen():
    found = route(SCORES, 0, {0, 2, 3}, 2)
    assert found.wanted == ((1, 3), (0, 1))
    assert found.chosen == ((3, 2), (0, 2))


def test_the_own_expert_is_always_alive():
    assert route(SCORES, 2, (), 1).chosen == ((2,), (2,))


def test_a_row_to_answer_locally_wants_only_the_own_expert():
    found = route(SCORES, 3, range(4), 2, local_rows={1})
    assert found.wanted == found.chosen == ((1, 3), (3,))


def test_an_expert_number_outside_the_fleet_is_never_chosen():
    assert route(SCORES, 0, {0, 9}, 4).chosen == ((0,), (0,))


@pytest.mark.parametrize(
    ("scores", "own", "top_k"),
    [
        (np.array([[np.nan, 1.0]]), 0, 1),
        (np.array([[np.inf, 1.0]]), 0, 1),
        (np.zeros(3), 0, 1),
        (SCORES, 4, 1),
        (SCORES, -1, 1),
        (SCORES, 0, 0),
        (SCORES, 0, 5),
    ],
)
def test_scores_and_arguments_out_of_range_are_refused(scores, own, top_k):
    with pytest.raises(LocalProtocolError):
        route(scores, own, range(4), top_k)


def test_weights_are_the_softmax_over_the_chosen_experts():
    # The paper's definition: every score outside the top-k becomes minus infinity before the softmax.
    masked = np.where(np.isin(np.arange(4), (1, 3)), SCORES[0], -np.inf)
    reference = np.exp(masked - 3.0) / np.exp(masked - 3.0).sum()
    weights = expert_weights(SCORES[0], (3, 1))
    assert list(weights) == [1, 3]
    assert [weights[e] for e in (1, 3)] == pytest.approx(reference[[1, 3]], rel=1e-6)


def test_weights_of_some_experts_are_the_weights_of_all_renormalised():
    of_all = expert_weights(SCORES[0], (0, 1, 2, 3))
    of_two = expert_weights(SCORES[0], (0, 2))
    total = of_all[0] + of_all[2]
    assert [of_two[0], of_two[2]] == pytest.approx([of_all[0] / total, of_all[2] / total], rel=1e-6)


def test_outputs_are_summed_by_weight():
    answers = {1: np.array([1.0, 0.0]), 2: np.array([0.0, 2.0])}
    assert combine(answers, {1: 0.25, 2: 0.75}).tolist() == [0.25, 1.5]


def test_probabilities_are_the_softmax_of_each_answer():
    answers = {1: np.array([100.0, 0.0]), 2: np.array([0.0, 1.0])}
    mixed = combine(answers, {1: 0.5, 2: 0.5}, "probabilities")
    assert mixed == pytest.approx(0.5 * softmax(answers[1]) + 0.5 * softmax(answers[2]))
    assert mixed.sum() == pytest.approx(1.0)


def test_an_unknown_combination_is_refused():
    with pytest.raises(LocalProtocolError, match="'mean'"):
        combine({1: np.zeros(2)}, {1: 1.0}, "mean")


def test_combining_the_largest_floats_does_not_overflow():
    largest = np.full(2, np.finfo(np.float32).max, np.float32)
    weights = expert_weights(np.zeros(3, np.float32), (0, 1, 2))
    assert np.isfinite(combine(dict.fromkeys(range(3), largest), weights)).all()
