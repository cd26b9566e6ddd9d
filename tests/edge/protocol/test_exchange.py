from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from edge.exchanges import OUTPUTS, SCORES, answer, exchange, outputs_of

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.exchange import Exchange, Fault
from nmoe_edge.protocol.messages import RowAnswer
from nmoe_edge.protocol.routing import route


def test_each_distinct_expert_gets_one_call_whatever_the_number_of_rows():
    scores = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    calls = exchange(scores, alive=range(5), top_k=2).start(0.0)
    assert sorted(call.expert for call in calls) == [0, 1, 2, 3, 4]
    assert sum(len(call.rows) for call in calls) == 64 * 2


def test_every_row_combines_the_answers_of_its_chosen_experts():
    it = exchange(top_k=2)
    for call in it.start(0.0):
        assert answer(it, call) == []
    assert it.done
    outputs, rows = it.result()
    for row, experts in enumerate([(1, 3), (1, 3), (0, 3)]):
        weights = expert_weights(SCORES[row], experts)
        answers = {expert: outputs_of(expert, [row])[0] for expert in experts}
        assert np.allclose(outputs[row], combine(answers, weights))
        assert rows[row] == RowAnswer(tuple(weights), tuple(weights.values()))
        assert not rows[row].degraded


def test_probabilities_can_be_combined_instead_of_outputs():
    it = exchange(top_k=2, combination="probabilities")
    for call in it.start(0.0):
        answer(it, call)
    outputs, _ = it.result()
    assert outputs.sum(axis=1) == pytest.approx([1, 1, 1])


def test_there_is_no_result_while_rows_are_open():
    it = exchange()
    it.start(0.0)
    with pytest.raises(LocalProtocolError, match="3 rows"):
        it.result()


def test_the_remaining_weight_is_renormalised_when_one_of_two_refuses():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    assert it.refused(first.request, 1.0) == [Fault(first.expert, "refused", 1.0)]
    answer(it, second)
    assert it.result()[1] == (RowAnswer((second.expert,), (1.0,), (first.expert,)),)


def test_the_next_expert_by_rank_is_asked_when_the_only_one_refuses():
    it = exchange(SCORES[:2])
    (call,) = it.start(0.0)
    fault, substitute = it.refused(call.request, 1.0)
    assert fault == Fault(1, "refused", 1.0)
    assert (substitute.expert, substitute.rows) == (3, (0, 1))
    answer(it, substitute)
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (1,)),) * 2


def test_an_expert_that_is_not_alive_is_never_a_substitute():
    it = exchange(SCORES[:1], alive={0, 1})
    (call,) = it.start(0.0)
    _, substitute = it.refused(call.request, 1.0)
    assert substitute.expert == 0


def test_a_lost_expert_is_not_asked_again():
    it = exchange(SCORES[:1])
    (call,) = it.start(0.0)
    assert it.lost(3, 0.5) == []
    _, substitute = it.refused(call.request, 1.0)
    assert substitute.expert == 2


def test_losing_a_peer_twice_is_one_fault():
    it = exchange(SCORES[:2])
    it.start(0.0)
    fault, substitute = it.lost(1, 0.5)
    assert fault == Fault(1, "lost", 0.5)
    assert substitute.rows == (0, 1)
    assert it.lost(1, 0.6) == []


def test_a_leaving_expert_is_asked_nothing_more_but_may_still_answer():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    it.leaving(first.expert)
    answer(it, second)
    assert not it.done
    answer(it, first)
    assert not it.result()[1][0].degraded
    it = exchange(SCORES[:1])
    it.leaving(1)
    (call,) = it.start(0.0)
    assert call.expert == 3


def test_an_expert_lost_before_the_start_is_not_asked():
    it = exchange(SCORES[:1], top_k=2)
    assert it.lost(1, 0.0) == []
    (call,) = it.start(0.0)
    assert call.expert == 3
    answer(it, call)
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (1,)),)


def test_a_late_expert_is_hedged_and_may_still_answer_first():
    it = exchange(SCORES[:1], patience=2.0)
    (call,) = it.start(0.0)
    assert it.wake_at == 2.0
    assert it.tick(1.9) == []
    (hedge,) = it.tick(2.0)
    assert (hedge.expert, it.wake_at) == (3, 4.0)
    assert it.tick(2.1) == []
    assert answer(it, call, 2.5) == []
    assert it.result()[1] == (RowAnswer((1,), (1.0,)),)
    answer(it, hedge, 2.6)
    assert it.stray == {"late": 1}


def test_a_hedge_that_answers_first_counts():
    it = exchange(SCORES[:1], patience=2.0)
    (call,) = it.start(0.0)
    (hedge,) = it.tick(2.0)
    answer(it, hedge, 2.5)
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (1,)),)
    answer(it, call, 2.6)
    assert it.stray == {"late": 1}


def test_a_late_second_expert_is_hedged_and_still_waited_for():
    it = exchange(SCORES[:1], top_k=2, patience=2.0)
    first, second = it.start(0.0)
    answer(it, first, 1.0)
    (hedge,) = it.tick(2.0)
    assert (hedge.expert, it.done) == (2, False)
    answer(it, second, 2.1)
    assert not it.result()[1][0].degraded


def test_each_expert_has_its_own_patience():
    found = route(SCORES[:1], 0, range(4), 2)
    it = Exchange(found, OUTPUTS, itertools.count(), deadline=10.0, patience={1: 5.0, 3: 1.0, 2: 9.0}.__getitem__)
    it.start(0.0)
    assert it.wake_at == 1.0
    it.tick(1.0)
    assert it.wake_at == 5.0


def test_a_call_reports_at_most_one_fault():
    it = exchange(SCORES[:1])
    (call,) = it.start(0.0)
    assert it.tick(10.0)[0] == Fault(1, "silent", 10.0)
    assert it.refused(call.request, 10.1) == []


def test_a_refusal_after_the_row_has_its_answer_is_not_a_fault():
    it = exchange(SCORES[:1], patience=2.0)
    (call,) = it.start(0.0)
    (hedge,) = it.tick(2.0)
    answer(it, call, 2.5)
    assert it.refused(hedge.request, 2.6) == []
    assert it.stray == {"late": 1}


def test_a_row_still_waits_for_its_peer_after_the_own_expert_failed():
    it = exchange(SCORES[:1], alive={0, 1}, patience=0.1)
    (call,) = it.start(0.0)
    (own,) = it.tick(0.1)
    assert own.expert == 0
    it.refused(own.request, 0.2)
    assert not it.done
    assert it.wake_at == 10.0
    answer(it, call, 0.3)
    assert it.result()[1] == (RowAnswer((1,), (1.0,)),)


def test_at_the_deadline_a_row_with_an_answer_does_not_wait_for_the_own_expert():
    it = exchange(SCORES[2:], top_k=2)  # the own expert and expert 3
    own, other = it.start(0.0)
    assert (own.expert, other.expert) == (0, 3)
    answer(it, other, 1.0)
    assert it.wake_at == 10.0
    assert it.tick(10.0) == []
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (0,)),)


def test_at_the_deadline_the_answers_that_arrived_count():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    answer(it, first)
    assert it.wake_at == 10.0
    assert it.tick(10.0) == [Fault(second.expert, "silent", 10.0)]
    assert it.result()[1] == (RowAnswer((first.expert,), (1.0,), (second.expert,)),)


def test_at_the_deadline_a_row_without_answers_goes_to_the_own_expert():
    it = exchange(SCORES[:2])
    it.start(0.0)
    fault, own = it.tick(10.0)
    assert fault == Fault(1, "silent", 10.0)
    assert (own.expert, own.rows) == (0, (0, 1))
    assert it.wake_at == math.inf
    answer(it, own, 10.1)
    assert it.result()[1] == (RowAnswer((0,), (1.0,), (1,)),) * 2


def test_an_exchange_that_starts_after_the_deadline_asks_only_the_own_expert():
    it = exchange()
    (own,) = it.start(10.0)
    assert (own.expert, own.rows) == (0, (0, 1, 2))


def test_after_the_deadline_no_peer_is_asked():
    it = exchange(SCORES[:1])
    (call,) = it.start(0.0)
    _, substitute = it.refused(call.request, 10.5)
    assert substitute.expert == 0


def test_the_own_expert_is_waited_for_beyond_the_deadline():
    it = exchange(SCORES[2:], top_k=1)
    (own,) = it.start(0.0)
    assert it.tick(99.0) == []
    answer(it, own, 100.0)
    assert it.done


def test_rows_answered_locally_are_not_degraded():
    it = exchange(local_rows={0, 1, 2})
    (own,) = it.start(0.0)
    assert own.expert == 0
    answer(it, own)
    assert not any(row.degraded for row in it.result()[1])


def test_a_peer_is_asked_when_the_own_expert_fails():
    it = exchange(SCORES[2:], own=0)
    (own,) = it.start(0.0)
    _, substitute = it.refused(own.request, 1.0)
    assert substitute.expert == 3


def test_a_row_for_which_every_expert_failed_is_zeros_and_names_none():
    it = exchange(SCORES[:1], alive=())
    (own,) = it.start(0.0)
    assert it.refused(own.request, 1.0) == [Fault(0, "refused", 1.0)]
    outputs, rows = it.result()
    assert not outputs.any()
    assert rows == (RowAnswer((), (), (1,)),)


def test_a_late_answer_is_ignored():
    it = exchange(SCORES[:1])
    (call,) = it.start(0.0)
    _, own = it.tick(10.0)
    answer(it, own, 10.1)
    before = it.result()[0]
    assert answer(it, call, 10.2) == []
    assert np.array_equal(it.result()[0], before)
    assert it.stray == {"late": 1}


def test_a_duplicate_answer_changes_nothing():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    answer(it, first)
    assert it.answered(first.request, first.expert, 99 + outputs_of(first.expert, first.rows), 1.1) == []
    assert it.stray == {"duplicate": 1}
    answer(it, second)
    weights = expert_weights(SCORES[0], (first.expert, second.expert))
    answers = {call.expert: outputs_of(call.expert, [0])[0] for call in (first, second)}
    assert np.allclose(it.result()[0][0], combine(answers, weights))


def test_a_reply_to_an_unknown_request_changes_nothing():
    it = exchange()
    it.start(0.0)
    assert it.answered(5, 1, outputs_of(1, [0, 1]), 1.0) == []
    assert it.refused(6, 1.0) == []
    assert it.stray == {"unknown": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda call: (call.expert, outputs_of(call.expert, [0, 1])[:1]),
        lambda call: (call.expert, outputs_of(call.expert, [0, 1, 2])),
        lambda call: (call.expert, np.zeros((2, OUTPUTS + 1), np.float32)),
        lambda call: (call.expert, np.full((2, OUTPUTS), np.nan, np.float32)),
        lambda call: (call.expert, np.full((2, OUTPUTS), np.inf, np.float32)),
        lambda call: (2, outputs_of(2, [0, 1])),
    ],
    ids=["a row short", "a row long", "an output long", "NaN", "infinity", "another expert"],
)
def test_a_wrong_answer_is_a_fault_and_the_next_is_asked(wrong):
    it = exchange(SCORES[:2])
    (call,) = it.start(0.0)
    fault, substitute = it.answered(call.request, *wrong(call), 1.0)
    assert fault == Fault(1, "wrong", 1.0)
    assert substitute.expert == 3


def test_each_extra_message_needs_its_own_permission_to_hedge():
    scores = np.array([[0, 9, 3, 2], [0, 9, 3, 2], [0, 9, 2, 3]], np.float32)  # all want 1; then 2, 2 and 3
    permissions = [True]
    it = exchange(scores, patience=2.0, may_hedge=lambda: bool(permissions and permissions.pop()))
    (call,) = it.start(0.0)
    (hedge,) = it.tick(2.0)
    assert (hedge.expert, hedge.rows) == (2, (0, 1))
    answer(it, call, 2.5)
    assert it.done
