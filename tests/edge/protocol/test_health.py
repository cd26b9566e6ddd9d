from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe_edge.protocol.health import (
    MAX_PAUSE_S,
    MAX_SILENCE_S,
    MIN_SAMPLES,
    MIN_SILENCE_S,
    SAMPLES,
    Health,
)

MIDDLE = 0.5
"""The random number that leaves a pause unchanged."""


def peer(chance=MIDDLE, alive_at=None):
    health = Health(lambda: chance)
    if alive_at is not None:
        probed(health, alive_at)
    return health


def probed(health, now):
    """Probe it as soon as `next_message` says so, and receive a Welcome."""
    assert health.next_message(max(now, health.wake_at)) == "probe"
    health.welcomed(now)


def asked(health, trips, start=0.0):
    """Send Asks one after another; trips: seconds until each answer."""
    for number, took in enumerate(trips):
        health.sent(number, start)
        health.replied(number, start + took)


def pause_after(health, now):
    """Seconds after `now` until it is probed again."""
    assert health.next_message(now) is None
    return health.wake_at - now


def test_an_unknown_peer_is_probed_at_once_and_not_asked():
    health = peer()
    assert not health.alive
    assert health.next_message(0.0) == "probe"
    assert health.next_message(0.0) is None


def test_a_welcome_makes_a_peer_alive():
    health = peer(alive_at=1.0)
    assert (health.state, health.alive) == ("alive", True)


@pytest.mark.parametrize("why", ["silent", "lost", "wrong", "foreign", "left"])
def test_a_failed_peer_owes_nothing_and_is_not_asked(why):
    health = peer(alive_at=0.0)
    health.sent(1, 0.0)
    health.failed(why, 0.1)
    assert (health.state, health.alive, health.owed) == (why, False, 0)
    assert not health.is_overdue(100.0)


@pytest.mark.parametrize("why", ["silent", "lost", "wrong", "foreign", "left"])
def test_pauses_double_with_each_failure_up_to_a_maximum(why):
    health, pauses = peer(alive_at=0.0), []
    for _ in range(12):
        health.failed(why, 0.0)
        pauses.append(pause_after(health, 0.0))
    longest = MAX_PAUSE_S.get(why, 1.0)
    assert pauses == pytest.approx([min(pauses[0] * 2**n, longest) for n in range(12)])
    assert pauses[-1] == pytest.approx(longest)


def test_thousands_of_failures_do_not_overflow_the_pause():
    health = peer()
    health.failures = 5000
    health.failed("lost", 0.0)
    assert pause_after(health, 0.0) == pytest.approx(1.0)


def test_chance_moves_a_pause_by_a_quarter_at_most():
    pauses = []
    for chance in (0.0, 0.5, 1.0):
        health = peer(chance)
        health.failed("left", 5.0)
        pauses.append(pause_after(health, 5.0))
    assert pauses == pytest.approx([0.75 * pauses[1], pauses[1], 1.25 * pauses[1]])


def test_a_probe_is_not_repeated_before_its_pause_is_over():
    health = peer(alive_at=0.0)
    health.failed("silent", 0.0)
    at = health.wake_at
    assert [health.next_message(at - 1e-6), health.next_message(at), health.next_message(at)] == [None, "probe", None]
    assert health.wake_at > at


def test_a_welcome_alone_forgets_no_failure():
    """A peer that greets and never answers is probed less and less often."""
    health = peer()
    for _ in range(3):
        health.failed("silent", 0.0)
    probed(health, 10.0)
    assert health.failures >= 3


def test_failures_are_forgotten_with_an_answer_that_makes_sense():
    health = peer()
    health.failed("wrong", 0.0)
    probed(health, 10.0)
    before = health.failures
    health.sent(1, 10.0)
    health.replied(1, 10.1)
    assert health.failures == before  # only answer_used() resets them
    health.answer_used()
    assert health.failures == 0


def test_a_welcome_without_a_probe_changes_nothing():
    health = peer(alive_at=0.0)
    health.failed("wrong", 1.0)
    health.welcomed(1.0)
    assert health.state == "wrong"


def test_a_pong_settles_only_a_ping():
    health = peer(alive_at=0.0)
    health.sent(1, 0.0)
    health.sent(2, 0.0, timed=False)
    health.answered_ping(1, 0.1)
    assert health.owed == 2
    health.answered_ping(2, 0.1)
    assert health.owed == 1


@pytest.mark.parametrize("why", ["silent", "lost", "foreign", "left"])
def test_a_failed_peer_that_contacts_us_is_probed_at_once(why):
    health = peer(alive_at=0.0)
    health.failed(why, 1.0)
    health.contacted_us(1.01)
    assert health.next_message(1.01) == "probe"


def test_a_wrong_peer_that_contacts_us_still_waits_for_its_pause():
    health = peer(alive_at=0.0)
    health.failed("wrong", 1.0)
    at = health.wake_at
    health.contacted_us(1.01)
    assert health.wake_at == at
    assert health.next_message(1.01) is None


def test_a_return_never_delays_a_probe():
    health = peer(alive_at=0.0)
    health.failed("lost", 0.0)
    at = health.wake_at
    health.contacted_us(at + 1)
    assert health.wake_at == at


def test_a_return_of_an_alive_peer_changes_nothing():
    health = peer(alive_at=1.0)
    health.contacted_us(1.1)
    assert (health.state, health.next_message(1.1)) == ("alive", None)


def test_p95_is_infinite_before_enough_round_trips():
    health = peer(alive_at=0.0)
    asked(health, [0.01] * (MIN_SAMPLES - 1))
    assert health.p95_s == math.inf
    asked(health, [0.01])
    assert health.p95_s == pytest.approx(0.01)


def test_p95_is_the_19th_of_20_round_trips():
    health = peer(alive_at=0.0)
    asked(health, [0.001 * n for n in range(1, 21)])
    assert health.p95_s == pytest.approx(0.019)


def test_p95_forgets_old_round_trips():
    health = peer(alive_at=0.0)
    asked(health, [5.0] * SAMPLES)
    asked(health, [0.01] * SAMPLES)
    assert health.p95_s == pytest.approx(0.01)


def test_the_round_trip_is_a_moving_average_of_the_measured_ones():
    health = peer(alive_at=0.0)
    asked(health, [0.1])
    assert health.rtt_s == pytest.approx(0.1)
    asked(health, [0.2])
    assert 0.1 < health.rtt_s < 0.15
    asked(health, [0.2] * 100)
    assert health.rtt_s == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(("took", "silence"), [(1e-4, MIN_SILENCE_S), (30.0, MAX_SILENCE_S)])
def test_the_limit_for_silence_has_bounds_whatever_the_round_trips(took, silence):
    health = peer(alive_at=0.0)
    assert health.silence_s == MIN_SILENCE_S
    asked(health, [took] * 40)
    assert health.silence_s == silence


def test_between_these_bounds_a_slow_peer_may_be_silent_for_longer():
    health = peer(alive_at=0.0)
    asked(health, [0.4] * 60)
    assert health.silence_s == pytest.approx(0.8, abs=0.02)


def test_a_peer_is_overdue_when_its_oldest_answer_takes_too_long():
    health = peer(alive_at=0.0)
    health.sent(1, 1.0)
    health.sent(2, 1.4)
    assert not health.is_overdue(1.0 + MIN_SILENCE_S - 1e-6)
    assert health.is_overdue(1.0 + MIN_SILENCE_S)
    health.replied(1, 1.5)
    assert not health.is_overdue(1.0 + MIN_SILENCE_S)
    assert health.is_overdue(1.4 + health.silence_s)


def test_a_peer_that_owes_nothing_is_never_overdue():
    assert not peer(alive_at=0.0).is_overdue(1e9)


def test_a_quiet_peer_is_pinged_after_ping_s():
    health = Health(lambda: MIDDLE, ping_s=0.5)
    probed(health, 1.0)
    assert health.next_message(1.49) is None
    assert health.next_message(1.5) == "ping"


def test_a_reply_postpones_the_ping():
    health = Health(lambda: MIDDLE, ping_s=0.5)
    probed(health, 0.0)
    health.sent(1, 0.3)
    health.replied(1, 0.35)
    assert health.next_message(0.84) is None
    assert health.next_message(0.86) == "ping"


def test_a_peer_is_not_pinged_for_quiet_while_it_owes_an_answer():
    health = Health(lambda: MIDDLE, ping_s=0.5)
    probed(health, 0.0)
    health.sent(1, 0.49)
    assert health.next_message(0.55) is None


def test_one_ping_is_sent_about_a_late_answer():
    health = peer(alive_at=0.0)
    health.sent(1, 1.0)
    late = 1.0 + health.doubt_s
    assert health.next_message(late - 1e-6) is None
    assert health.next_message(late) == "ping"
    health.sent(2, late, timed=False)
    assert [health.next_message(late + wait) for wait in (0.0, 0.1, 0.2, 0.3)] == [None] * 4


def test_a_peer_with_a_late_answer_is_not_trusted_until_it_comes():
    health = peer(alive_at=0.0)
    health.sent(1, 1.0)
    late = 1.0 + health.doubt_s
    assert (health.trusted(late - 1e-6), health.trusted(late)) == (True, False)
    assert health.alive
    health.replied(1, late)
    assert health.trusted(late)


def test_a_peer_that_is_not_alive_is_not_trusted():
    health = peer()
    assert not health.trusted(0.0)
    probed(health, 0.0)
    assert health.trusted(0.0)
    health.failed("left", 0.0)
    assert not health.trusted(0.0)


@pytest.mark.parametrize("took", [1e-4, 0.1, 0.4, 30.0])
def test_an_answer_is_late_before_the_peer_is_silent(took):
    health = peer(alive_at=0.0)
    asked(health, [took] * 40)
    assert 0 < health.doubt_s <= health.silence_s


def test_a_ping_is_sent_about_every_late_answer():
    health = peer(alive_at=0.0)
    health.sent(1, 1.0)
    health.sent(2, 1.0)
    assert health.next_message(1.2) == "ping"
    health.replied(1, 1.21, sound=False)
    assert health.next_message(1.21) == "ping"


def test_pings_are_not_recorded_as_round_trips():
    health = peer(alive_at=0.0)
    for number in range(MIN_SAMPLES):
        health.sent(number, 0.0, timed=False)
        health.replied(number, 0.3)
    assert (health.rtt_s, health.p95_s, health.owed) == (None, math.inf, 0)


def test_refusals_and_unknown_answers_are_not_recorded_as_round_trips():
    health = peer(alive_at=0.0)
    health.sent(1, 0.0)
    health.replied(1, 0.3, sound=False)
    health.replied(99, 0.4)
    assert (health.rtt_s, health.owed) == (None, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ping", "reply", "late", "refuse", "welcome", "fail", "nonsense", "return", "act"]),
        st.floats(0, 2, allow_nan=False),
    ),
    max_size=40,
)


@given(STEPS, st.floats(0, 1))
def test_before_wake_at_there_is_nothing_to_do_and_at_it_there_is(steps, chance):
    health = Health(lambda: chance)
    now = 0.0
    number = 0
    open_ = []
    for what, later in steps:
        now += later
        if what in ("ask", "ping") and health.alive:
            number += 1
            health.sent(number, now, timed=what == "ask")
            open_.append(number)
        elif what in ("reply", "late", "refuse") and open_:
            health.replied(open_.pop(0 if what != "late" else -1), now, sound=what != "refuse")
        elif what == "welcome" and not health.alive:
            now = max(now, health.wake_at)
            probed(health, now)
        elif what in ("fail", "nonsense"):
            health.failed("wrong" if what == "nonsense" else "silent", now)
        elif what == "return":
            health.contacted_us(now)
        elif what == "act" and not health.is_overdue(now):
            health.next_message(now)
        before, at = math.nextafter(health.wake_at, -math.inf), health.wake_at
        assert not health.is_overdue(before)
        assert copy.deepcopy(health).next_message(before) is None
        assert health.is_overdue(at) or copy.deepcopy(health).next_message(at) is not None


def test_a_probe_that_could_not_be_sent_is_not_a_failure():
    health = peer()
    for now in (0.0, 0.2, 0.4):
        assert health.next_message(now) == "probe"
        health.probe_not_sent(now)
    assert health.failures == 0
    assert health.wake_at == pytest.approx(0.6)
