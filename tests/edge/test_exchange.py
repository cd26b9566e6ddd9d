from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.exchange import Call, Exchange, Fault
from nmoe_edge.protocol.messages import RowAnswer
from nmoe_edge.protocol.routing import route

OUTPUTS = 3
SCORES = np.array([[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 1.0, 2.0], [9.0, 0.0, 1.0, 2.0]], np.float32)


def says(expert, rows):
    """What an expert answers: a function of who it is and which row it is, so that a mix-up shows."""
    return np.array([[expert, row, expert * row + 1] for row in rows], np.float32)


def exchange(scores=SCORES, own=0, alive=range(4), top_k=1, deadline=10.0, patience=math.inf, at_home=(), **more):
    found = route(scores, own, alive, top_k, at_home)
    return Exchange(found, OUTPUTS, itertools.count(100), deadline=deadline, patience=patience, **more)


def answer(it, call, now=1.0):
    return it.answered(call.request, call.expert, says(call.expert, call.rows), now)


def test_one_call_for_each_distinct_expert_whatever_the_number_of_rows():
    scores = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    calls = exchange(scores, alive=range(5), top_k=2).start(0.0)
    assert sorted(call.expert for call in calls) == [0, 1, 2, 3, 4]
    assert sum(len(call.rows) for call in calls) == 64 * 2


def test_every_row_gets_what_its_own_experts_said():
    it = exchange(top_k=2)
    for call in it.start(0.0):
        assert answer(it, call) == []
    assert it.done
    outputs, rows = it.result()
    for row, experts in enumerate([(1, 3), (1, 3), (0, 3)]):
        weights = expert_weights(SCORES[row], experts)
        answers = {expert: says(expert, [row])[0] for expert in experts}
        assert np.allclose(outputs[row], combine(answers, weights))
        assert rows[row] == RowAnswer(tuple(weights), tuple(weights.values()))
        assert not rows[row].degraded


def test_probabilities_are_combined_when_the_manifest_says_so():
    it = exchange(top_k=2, combination="probabilities")
    for call in it.start(0.0):
        answer(it, call)
    outputs, _ = it.result()
    assert outputs.sum(axis=1) == pytest.approx([1, 1, 1])


def test_an_exchange_without_all_its_rows_gives_no_result():
    it = exchange()
    it.start(0.0)
    with pytest.raises(LocalProtocolError, match="3 rows"):
        it.result()


def test_the_rest_is_renormalised_when_one_of_two_refuses():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    assert it.refused(first.request, 1.0) == [Fault(first.expert, "refused")]
    answer(it, second)
    assert it.result()[1] == (RowAnswer((second.expert,), (1.0,), (first.expert,)),)


def test_the_next_by_rank_is_asked_when_nobody_answered():
    it = exchange(SCORES[:2])
    (call,) = it.start(0.0)
    fault, substitute = it.refused(call.request, 1.0)
    assert fault == Fault(1, "refused")
    assert (substitute.expert, substitute.rows) == (3, (0, 1))
    answer(it, substitute)
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (1,)),) * 2


def test_the_dead_are_never_substitutes():
    it = exchange(SCORES[:1], alive={0, 1})
    (call,) = it.start(0.0)
    _, substitute = it.refused(call.request, 1.0)
    assert substitute.expert == 0


def test_who_was_lost_is_not_asked_again():
    it = exchange(SCORES[:1])
    (call,) = it.start(0.0)
    assert it.lost(3, 0.5) == []
    _, substitute = it.refused(call.request, 1.0)
    assert substitute.expert == 2


def test_a_lost_peer_is_a_fault_once():
    it = exchange(SCORES[:2])
    it.start(0.0)
    fault, substitute = it.lost(1, 0.5)
    assert fault == Fault(1, "lost")
    assert substitute.rows == (0, 1)
    assert it.lost(1, 0.6) == []


def test_a_silent_peer_has_a_substitute_after_patience_and_may_still_answer_first():
    it = exchange(SCORES[:1], patience=2.0)
    (call,) = it.start(0.0)
    assert it.wake_at == 2.0
    assert it.tick(1.9) == []
    fault, substitute = it.tick(2.0)
    assert fault == Fault(1, "silent")
    assert (substitute.expert, it.wake_at) == (3, 4.0)
    assert answer(it, call, 2.5) == []
    assert it.done
    assert it.result()[1] == (RowAnswer((1,), (1.0,)),)
    answer(it, substitute, 2.6)
    assert it.stray == {"late": 1}


def test_a_substitute_that_answers_first_is_taken():
    it = exchange(SCORES[:1], patience=2.0)
    (call,) = it.start(0.0)
    _, substitute = it.tick(2.0)
    answer(it, substitute, 2.5)
    assert it.result()[1] == (RowAnswer((3,), (1.0,), (1,)),)
    answer(it, call, 2.6)
    assert it.stray == {"late": 1}


def test_at_the_deadline_whoever_answered_counts():
    it = exchange(SCORES[:1], top_k=2)
    first, second = it.start(0.0)
    answer(it, first)
    assert it.wake_at == 10.0
    assert it.tick(10.0) == [Fault(second.expert, "silent")]
    assert it.result()[1] == (RowAnswer((first.expert,), (1.0,), (second.expert,)),)


def test_at_the_deadline_a_row_without_anybody_is_the_own_experts():
    it = exchange(SCORES[:2])
    it.start(0.0)
    fault, own = it.tick(10.0)
    assert fault == Fault(1, "silent")
    assert (own.expert, own.rows) == (0, (0, 1))
    assert it.wake_at == math.inf
    answer(it, own, 10.1)
    assert it.result()[1] == (RowAnswer((0,), (1.0,), (1,)),) * 2


def test_an_exchange_that_starts_too_late_asks_nobody_but_the_own_expert():
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


def test_rows_at_home_are_the_own_experts_and_not_degraded():
    it = exchange(at_home={0, 1, 2})
    (own,) = it.start(0.0)
    assert own.expert == 0
    answer(it, own)
    assert not any(row.degraded for row in it.result()[1])


def test_an_own_expert_that_breaks_leaves_the_row_to_the_others():
    it = exchange(SCORES[2:], own=0)
    (own,) = it.start(0.0)
    _, substitute = it.refused(own.request, 1.0)
    assert substitute.expert == 3


def test_when_everybody_breaks_the_row_says_that_nobody_answered():
    it = exchange(SCORES[:1], alive=())
    (own,) = it.start(0.0)
    assert it.refused(own.request, 1.0) == [Fault(0, "refused")]
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
    assert it.answered(first.request, first.expert, 99 + says(first.expert, first.rows), 1.1) == []
    assert it.stray == {"duplicate": 1}
    answer(it, second)
    weights = expert_weights(SCORES[0], (first.expert, second.expert))
    answers = {call.expert: says(call.expert, [0])[0] for call in (first, second)}
    assert np.allclose(it.result()[0][0], combine(answers, weights))


def test_an_answer_that_nobody_asked_for_changes_nothing():
    it = exchange()
    it.start(0.0)
    assert it.answered(5, 1, says(1, [0, 1]), 1.0) == []
    assert it.refused(6, 1.0) == []
    assert it.stray == {"unknown": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda call: (call.expert, says(call.expert, [0, 1])[:1]),
        lambda call: (call.expert, says(call.expert, [0, 1, 2])),
        lambda call: (call.expert, np.zeros((2, OUTPUTS + 1), np.float32)),
        lambda call: (call.expert, np.full((2, OUTPUTS), np.nan, np.float32)),
        lambda call: (call.expert, np.full((2, OUTPUTS), np.inf, np.float32)),
        lambda call: (2, says(2, [0, 1])),
    ],
    ids=["a row short", "a row long", "an output long", "NaN", "infinity", "another expert"],
)
def test_a_wrong_answer_is_a_fault_and_the_next_is_asked(wrong):
    it = exchange(SCORES[:2])
    (call,) = it.start(0.0)
    fault, substitute = it.answered(call.request, *wrong(call), 1.0)
    assert fault == Fault(1, "wrong")
    assert substitute.expert == 3


BEHAVIOURS = ("answers", "answers late", "refuses", "is silent", "is lost", "answers twice", "answers wrongly", "NaN")


def run(it, behaviours, chance):
    """Drive an exchange with peers that behave as told and events in any order; the number of asks a row and expert."""
    now, events, asked = 0.0, [], {}

    def take(actions):
        for action in actions:
            if isinstance(action, Call):
                for row in action.rows:
                    asked[row, action.expert] = asked.get((row, action.expert), 0) + 1
                events.append(action)

    take(it.start(now))
    for _ in range(10_000):
        if it.done:
            return asked
        now += chance.random()
        if not events or chance.random() < 0.2:
            # Nothing can come: the driver sleeps until the exchange wants to be woken.
            now = max(now, it.wake_at) if not events and it.wake_at < math.inf else now
            take(it.tick(now))
            continue
        call = events.pop(chance.randrange(len(events)))
        behaviour = "answers" if call.expert == it.route.own else behaviours[call.expert]
        rows, reply = call.rows, says(call.expert, call.rows)
        if behaviour in ("answers", "answers twice"):
            take(it.answered(call.request, call.expert, reply, now))
        if behaviour == "answers twice":
            take(it.answered(call.request, call.expert, reply + 1, now))
        elif behaviour == "answers late":
            now += 20
            take(it.tick(now))
            take(it.answered(call.request, call.expert, reply, now))
        elif behaviour == "refuses":
            take(it.refused(call.request, now))
        elif behaviour == "is lost":
            take(it.lost(call.expert, now))
        elif behaviour == "answers wrongly":
            take(it.answered(call.request, call.expert, np.zeros((len(rows) + 1, OUTPUTS)), now))
        elif behaviour == "NaN":
            take(it.answered(call.request, call.expert, reply * np.nan, now))
    raise AssertionError("the exchange does not end")


def check(it, scores, asked, honest):
    """Every row has an output that is the weighted sum of what honest experts said to that very row."""
    outputs, rows = it.result()
    assert outputs.shape == (len(scores), OUTPUTS)
    assert np.isfinite(outputs).all()
    assert len(rows) == len(scores)
    assert all(count == 1 for count in asked.values())
    assert it.wake_at == math.inf
    for row, how in enumerate(rows):
        assert how.experts, "with an own expert that works, somebody always answers"
        assert set(how.experts) <= honest | {it.route.own}
        weights = expert_weights(scores[row], how.experts)
        answers = {expert: says(expert, [row])[0] for expert in how.experts}
        assert np.allclose(outputs[row], combine(answers, weights))
        assert set(how.missing) == set(it.route.wanted[row]) - set(how.experts)


@pytest.mark.parametrize("experts", range(1, 9))
def test_every_row_ends_in_a_result_whatever_subset_of_the_experts_is_dead(experts):
    chance = random.Random(experts)
    draw = np.random.default_rng(experts)
    for dead in itertools.product([False, True], repeat=experts):
        for top_k in {1, min(2, experts), experts}:
            scores = draw.normal(size=(4, experts)).astype(np.float32)
            behaviours = [chance.choice(("is silent", "is lost")) if d else "answers" for d in dead]
            known_dead = {expert for expert in range(experts) if dead[expert] and chance.random() < 0.3}
            it = exchange(
                scores,
                own=chance.randrange(experts),
                alive=set(range(experts)) - known_dead,
                top_k=top_k,
                patience=chance.choice((1.0, math.inf)),
            )
            asked = run(it, behaviours, chance)
            check(it, scores, asked, {expert for expert in range(experts) if not dead[expert]})


@settings(max_examples=500)
@given(
    st.lists(st.sampled_from(BEHAVIOURS), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([0.5, 3.0, math.inf]),
    st.integers(0, 2**32),
)
def test_every_row_ends_in_a_result_whatever_the_peers_do(behaviours, top_k, rows, patience, seed):
    experts = len(behaviours)
    scores = np.random.default_rng(seed).normal(size=(rows, experts)).astype(np.float32)
    own = seed % experts
    it = exchange(scores, own=own, alive=range(experts), top_k=min(top_k, experts), patience=patience)
    asked = run(it, behaviours, random.Random(seed))
    check(it, scores, asked, {e for e in range(experts) if behaviours[e].startswith("answers")} - liars(behaviours))


def liars(behaviours):
    return {expert for expert, behaviour in enumerate(behaviours) if behaviour == "answers wrongly"}
