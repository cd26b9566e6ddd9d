"""The exchange with events in any order, and with any of its experts dead."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from edge.exchanges import OUTPUTS, exchange, outputs_of
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.exchange import Call

BEHAVIOURS = (
    "answers",
    "answers late",
    "refuses",
    "is silent",
    "is lost",
    "leaves",
    "answers twice",
    "answers wrongly",
    "NaN",
)
OWN_BEHAVIOURS = ("answers", "answers late", "refuses", "NaN")


def run(it, behaviours, chance):
    """Drive an exchange to its end with events in random order; (row, expert) -> how often it was asked.

    behaviours: one for each expert; chance: a random.Random
    """
    now = 0.0
    events = []
    asked = Counter()

    def take(actions):
        for action in actions:
            if isinstance(action, Call):
                asked.update((row, action.expert) for row in action.rows)
                events.append(action)

    take(it.start(now))
    for _ in range(10_000):
        if it.done:
            return asked
        now += chance.random()
        if not events or chance.random() < 0.2:
            # Without an event to come, sleep until wake_at.
            now = max(now, it.wake_at) if not events and it.wake_at < math.inf else now
            take(it.tick(now))
            continue
        call = events.pop(chance.randrange(len(events)))
        behaviour = behaviours[call.expert]
        reply = outputs_of(call.expert, call.rows)
        if behaviour == "answers late":
            now += 20
            take(it.tick(now))
        if behaviour == "leaves":
            it.leaving(call.expert)
        if behaviour in ("answers", "answers late", "answers twice", "leaves"):
            take(it.answered(call.request, call.expert, reply, now))
        if behaviour == "answers twice":
            take(it.answered(call.request, call.expert, reply + 1, now))
        elif behaviour == "refuses":
            take(it.refused(call.request, now))
        elif behaviour == "is lost":
            take(it.lost(call.expert, now))
        elif behaviour == "answers wrongly":
            take(it.answered(call.request, call.expert, np.zeros((len(call.rows) + 1, OUTPUTS)), now))
        elif behaviour == "NaN":
            take(it.answered(call.request, call.expert, reply * np.nan, now))
    raise AssertionError("the exchange did not finish")


def check(it, scores, asked, behaviours):
    """Every row's output is the weighted sum of what sound experts answered for that row."""
    outputs, rows = it.result()
    sound = {e for e, behaviour in enumerate(behaviours) if behaviour.startswith(("answers", "leaves"))}
    sound -= {e for e, behaviour in enumerate(behaviours) if behaviour == "answers wrongly"}
    assert outputs.shape == (len(scores), OUTPUTS)
    assert np.isfinite(outputs).all()
    assert len(rows) == len(scores)
    assert not asked or max(asked.values()) == 1, "an expert was asked twice for a row"
    assert it.wake_at == math.inf
    for row, how in enumerate(rows):
        assert set(how.experts) <= sound
        assert how.experts or it.route.own not in sound, "a row has no answer although the own expert works"
        assert len(how.experts) <= len(it.route.chosen[row])
        best = sorted(it.route.wanted[row], key=lambda expert: -scores[row][expert])
        assert how.missing == tuple(expert for expert in best if expert not in how.experts)
        if not how.experts:
            assert not outputs[row].any()
            continue
        weights = expert_weights(scores[row], how.experts)
        answers = {expert: outputs_of(expert, [row])[0] for expert in how.experts}
        assert np.allclose(outputs[row], combine(answers, weights))


@pytest.mark.parametrize("experts", range(1, 9))
def test_every_row_ends_in_a_result_whatever_subset_of_the_experts_is_dead(experts):
    chance = random.Random(experts)
    draw = np.random.default_rng(experts)
    for dead in itertools.product([False, True], repeat=experts):
        for top_k in {1, min(2, experts), experts}:
            scores = draw.normal(size=(4, experts)).astype(np.float32)
            own = chance.randrange(experts)
            behaviours = [chance.choice(("is silent", "is lost")) if d else "answers" for d in dead]
            behaviours[own] = "refuses" if dead[own] else "answers"
            known_dead = {expert for expert in range(experts) if dead[expert] and chance.random() < 0.3}
            patience = chance.choice((1.0, math.inf))
            it = exchange(scores, own, set(range(experts)) - known_dead, top_k, patience=patience)
            check(it, scores, run(it, behaviours, chance), behaviours)


@settings(max_examples=1000)
@given(
    st.lists(st.sampled_from(BEHAVIOURS), min_size=0, max_size=7),
    st.sampled_from(OWN_BEHAVIOURS),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([0.5, 3.0, math.inf]),
    st.integers(0, 2**32),
)
def test_every_row_ends_in_a_result_whatever_the_peers_do(peers, own_behaviour, top_k, rows, patience, seed):
    own = seed % (len(peers) + 1)
    behaviours = [*peers[:own], own_behaviour, *peers[own:]]
    scores = np.random.default_rng(seed).normal(size=(rows, len(behaviours))).astype(np.float32)
    it = exchange(scores, own, range(len(behaviours)), min(top_k, len(behaviours)), patience=patience)
    check(it, scores, run(it, behaviours, random.Random(seed)), behaviours)


@given(st.lists(st.sampled_from(("answers", "answers twice", "leaves")), min_size=1, max_size=8), st.integers(0, 2**32))
def test_no_row_is_degraded_when_every_expert_answers_in_time(behaviours, seed):
    scores = np.random.default_rng(seed).normal(size=(3, len(behaviours))).astype(np.float32)
    it = exchange(scores, 0, range(len(behaviours)), min(3, len(behaviours)), deadline=1e6)
    run(it, behaviours, random.Random(seed))
    assert not any(how.degraded for how in it.result()[1])
