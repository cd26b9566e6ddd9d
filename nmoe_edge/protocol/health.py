"""The circuit breaker of one peer: whether it may be asked, when to ping or probe it, how long its answers take.

    state    meaning                                               may be asked       first pause, longest pause
    -------  ----------------------------------------------------  -----------------  --------------------------
    unknown  not greeted yet                                       no                 none: probed at once
    alive    it welcomed our Hello                                 if it is `trusted`
    silent   an answer took longer than `silence_s`                no                 0.2 s, 1.5 s
    lost     the connection is gone                                no                 0.2 s, 1 s
    wrong    it sent what makes no sense                           no                 0.2 s, 60 s
    foreign  it belongs to another fleet or has another extractor  no                 0.2 s, 10 s
    left     it said that it shuts down                            no                 0.2 s, 1 s

    from             event                                           to
    ---------------  ----------------------------------------------  ----------------------------------------------
    alive            an answer takes longer than `doubt_s`           alive, not trusted until it comes; pinged once
    any              `failed(why)`                                   why; the pause doubles with each failure
    any but alive    the pause is over                               the same; `next_message` is "probe": send a Hello
    any but alive    `contacted_us`                                  the same, probed at once (wrong: not earlier)
    probed           `welcomed`                                      alive
    probed           `probe_not_sent`: no Hello could be sent        the same, not counted, probed after 0.2 s

A breaker closes with a welcome, but failures are forgotten only when an answer is used (`answer_used`): a peer that
greets and never answers is probed less and less often.

Pure: time and chance are arguments. The caller sends the messages, and calls `failed("silent")` when a peer is
`is_overdue`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Literal

State = Literal["unknown", "alive", "silent", "lost", "wrong", "foreign", "left"]
Failure = Literal["silent", "lost", "wrong", "foreign", "left"]

MIN_SILENCE_S = 0.5
"""A small board under load pauses for some hundred milliseconds."""
MAX_SILENCE_S = 1.2
MIN_DOUBT_S = 0.1
FIRST_PAUSE_S = 0.2
MAX_PAUSE_S: dict[State, float] = {"silent": 1.5, "wrong": 60.0, "foreign": 10.0}
"""1 s for other states. A frozen or restarted peer is back soon; one that talks nonsense is not."""
SAMPLES = 64
MIN_SAMPLES = 16
"""Fewer round trips say nothing about the slowest twentieth."""

_NO_REQUEST = -1


class Health:
    """The breaker of one peer, and its round trips."""

    def __init__(self, chance: Callable[[], float], ping_s: float = 0.5) -> None:
        """A peer that was not greeted yet.

        chance: a random number in 0..1, so that devices do not probe in step
        ping_s: seconds of quiet after which an alive peer is pinged
        """
        self.state: State = "unknown"
        self.failures = 0
        """Failures in a row, unanswered probes included. A sound answer resets it; a welcome does not."""
        self.rtt_s: float | None = None
        """Smoothed round trip of an Ask, computation included."""
        self._rtt_deviation_s = 0.0
        self._round_trips_s: deque[float] = deque(maxlen=SAMPLES)
        self._owed: dict[int, tuple[float, bool]] = {}  # request -> when it was sent, whether to learn from it; by age
        self._probing = False
        self._doubted = _NO_REQUEST
        """The owed request that a ping was sent about."""
        self._chance = chance
        self._ping_s = ping_s
        self._probe_at = 0.0
        self._quiet_since = 0.0

    @property
    def alive(self) -> bool:
        """Whether the breaker is closed."""
        return self.state == "alive"

    def trusted(self, now: float) -> bool:
        """Whether to ask it: it is alive, and no answer is late."""
        if self.state != "alive":
            return False
        return not self._owed or now < next(iter(self._owed.values()))[0] + self.doubt_s

    @property
    def owed(self) -> int:
        """Number of replies still expected from this peer."""
        return len(self._owed)

    @property
    def silence_s(self) -> float:
        """Seconds after which a peer that owes an answer is silent."""
        return min(max(2 * self._usual_s, MIN_SILENCE_S), MAX_SILENCE_S)

    @property
    def doubt_s(self) -> float:
        """Seconds after which an answer is late: the peer is pinged, and asked nothing more for now."""
        return min(max(2 * self._usual_s, MIN_DOUBT_S), MAX_SILENCE_S)

    @property
    def _usual_s(self) -> float:
        """Mean and four deviations of the round trip, as in TCP's retransmission timer; 0 while it is unknown."""
        return 0.0 if self.rtt_s is None else self.rtt_s + 4 * self._rtt_deviation_s

    @property
    def p95_s(self) -> float:
        """95th percentile of the last round trips; infinity while there are fewer than MIN_SAMPLES."""
        if len(self._round_trips_s) < MIN_SAMPLES:
            return math.inf
        return sorted(self._round_trips_s)[math.ceil(0.95 * len(self._round_trips_s)) - 1]

    @property
    def wake_at(self) -> float:
        """When to look at `is_overdue` and `next_message` again: before it nothing changes by itself."""
        if not self.alive:
            return self._probe_at
        oldest = next(iter(self._owed), None)
        if oldest is None:
            return self._quiet_since + self._ping_s
        return self._owed[oldest][0] + (self.silence_s if oldest == self._doubted else self.doubt_s)

    def next_message(self, now: float) -> Literal["probe", "ping"] | None:
        """What to send now, if anything: a probe is a Hello to a peer that is not alive, a ping goes to one that is.

        Each probe counts as a failure until it is answered, and starts the next pause.
        """
        if not self.alive:
            if now < self._probe_at:
                return None
            self.failures += 1
            self._probing = True
            self._pause(now)
            return "probe"
        if now < self.wake_at:
            return None
        oldest = next(iter(self._owed), _NO_REQUEST)
        if oldest != _NO_REQUEST and oldest == self._doubted:
            return None  # pinged about it before; it is overdue now
        self._doubted = oldest
        return "ping"

    def is_overdue(self, now: float) -> bool:
        """Whether its oldest answer took longer than `silence_s`: the caller reports it as failed."""
        oldest = next(iter(self._owed.values()), None)
        return self.alive and oldest is not None and now >= oldest[0] + self.silence_s

    def sent(self, request: int, now: float, timed: bool = True) -> None:
        """An Ask was sent; with timed=False a Ping, which does no work, so its round trip is not recorded."""
        self._owed[request] = (now, timed)

    def replied(self, request: int, now: float, sound: bool = True) -> None:
        """It replied to `request`. With sound=False it refused, and the round trip is not recorded."""
        sent_at, timed = self._owed.pop(request, (now, False))
        self._quiet_since = now
        if not (timed and sound):
            return
        took = now - sent_at
        self._round_trips_s.append(took)
        if self.rtt_s is None:
            self.rtt_s = took
            self._rtt_deviation_s = took / 2
        else:
            self._rtt_deviation_s += (abs(took - self.rtt_s) - self._rtt_deviation_s) / 4
            self.rtt_s += (took - self.rtt_s) / 8

    def answered_ping(self, request: int, now: float) -> None:
        """It sent a Pong, which settles a Ping and nothing else it owes."""
        if not self._owed.get(request, (now, True))[1]:
            self.replied(request, now)

    def answer_used(self) -> None:
        """One of its answers was used: its failures are forgotten."""
        self.failures = 0

    def welcomed(self, now: float) -> None:
        """It sent a Welcome; one that answers no probe of ours changes nothing."""
        if self._probing:
            self.state = "alive"
            self._quiet_since = now
            self._probing = False

    def failed(self, why: Failure, now: float) -> None:
        """Open the breaker: it owes nothing more, and is probed after a pause."""
        self.state = why
        self._probing = False
        self.failures += 1
        self._owed.clear()
        self._pause(now)

    def probe_not_sent(self, now: float) -> None:
        """The probe could not be sent. That costs nothing, so it does not count as a failure."""
        self.failures -= 1
        self._probing = False
        self._probe_at = now + FIRST_PAUSE_S

    def contacted_us(self, now: float) -> None:
        """The peer contacted us: probe it at once, unless it was wrong, which waits for the end of its pause."""
        if not self.alive and self.state != "wrong":
            self._probe_at = min(self._probe_at, now)

    def _pause(self, now: float) -> None:
        """Set the next probe: a pause that doubles with each failure, give or take a quarter."""
        doublings = min(max(self.failures - 1, 0), 16)
        pause_s = min(FIRST_PAUSE_S * 2**doublings, MAX_PAUSE_S.get(self.state, 1.0))
        self._probe_at = now + pause_s * (0.75 + 0.5 * self._chance())
