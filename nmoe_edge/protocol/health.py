"""One peer as this device sees it: how long it takes to answer, and whether it is worth asking.

A circuit breaker: `alive` peers are asked; one that is silent, lost or wrong is asked nothing more until a probe, a
Hello after a pause that doubles with each failure, is welcomed. Pure: time and chance are arguments.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Literal

State = Literal["unknown", "alive", "silent", "lost", "wrong", "foreign", "left"]
Failure = Literal["silent", "lost", "wrong", "foreign", "left"]

LEAST_SILENCE_S, MOST_SILENCE_S = 0.5, 1.2
"""How long a peer may owe an answer: a busy small board pauses for some hundred milliseconds."""
LEAST_DOUBT_S = 0.1
"""An answer that takes longer is asked after, and nothing more is asked until it has come."""
FIRST_PAUSE_S = 0.2
MOST_PAUSE_S: dict[State, float] = {"silent": 1.5, "wrong": 60.0, "foreign": 10.0}
"""Before the next probe. A frozen or restarted peer is back soon; one that talks nonsense is not."""
SAMPLES = 64
LEAST_SAMPLES = 16
"""Fewer round trips say nothing about the slowest twentieth."""


class Health:
    """The breaker of one peer, and its round trips."""

    def __init__(self, chance: Callable[[], float], ping_s: float = 0.5) -> None:
        """chance: 0..1, so that devices do not probe in step; ping_s: how often a quiet peer is asked whether it is."""
        self.state: State = "unknown"
        self.failures = 0
        """In a row, unanswered probes among them, since it last gave an answer that makes sense: a welcome is none."""
        self.rtt_s: float | None = None
        """Smoothed round trip of what was asked, with the work that was in it."""
        self._varies_s = 0.0
        self._trips: deque[float] = deque(maxlen=SAMPLES)
        self._owed: dict[int, tuple[float, bool]] = {}
        self._probing = False
        self._doubted = -1
        """The request that was asked after."""
        self._chance, self._ping_s = chance, ping_s
        self._probe_at, self._quiet_since = 0.0, 0.0

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        return self.state == "alive"

    def trusted(self, now: float) -> bool:
        """Whether it may be asked, and owes nothing for longer than usual."""
        if self.state != "alive":
            return False
        return not self._owed or now < next(iter(self._owed.values()))[0] + self.doubt_s

    @property
    def owed(self) -> int:
        """How many answers."""
        return len(self._owed)

    @property
    def silence_s(self) -> float:
        """How long an answer may take before the peer counts as silent."""
        return min(max(2 * self._usual_s, LEAST_SILENCE_S), MOST_SILENCE_S)

    @property
    def doubt_s(self) -> float:
        """How long it may take before nothing more is asked of it for now."""
        return min(max(2 * self._usual_s, LEAST_DOUBT_S), MOST_SILENCE_S)

    @property
    def _usual_s(self) -> float:
        return 0.0 if self.rtt_s is None else self.rtt_s + 4 * self._varies_s

    @property
    def p95_s(self) -> float:
        """What nineteen in twenty of the last asks took at most; infinity while too few are known."""
        if len(self._trips) < LEAST_SAMPLES:
            return math.inf
        return sorted(self._trips)[math.ceil(0.95 * len(self._trips)) - 1]

    @property
    def wake_at(self) -> float:
        """When `due` or `overdue` will say something else."""
        if not self.alive:
            return self._probe_at
        oldest = next(iter(self._owed), None)
        if oldest is None:
            return self._quiet_since + self._ping_s
        return self._owed[oldest][0] + (self.silence_s if oldest == self._doubted else self.doubt_s)

    def due(self, now: float) -> Literal["probe", "ping"] | None:
        """What to send it now, if anything; a probe is not due again before its pause is over."""
        if not self.alive:
            if now < self._probe_at:
                return None
            self.failures += 1  # until it is answered
            self._probing = True
            self._pause(now)
            return "probe"
        if now < self.wake_at:
            return None
        oldest = next(iter(self._owed), -1)
        if oldest == self._doubted != -1:
            return None
        self._doubted = oldest
        return "ping"

    def overdue(self, now: float) -> bool:
        """Whether it owes an answer for too long."""
        oldest = next(iter(self._owed.values()), None)
        return self.alive and oldest is not None and now >= oldest[0] + self.silence_s

    def sent(self, request: int, now: float, timed: bool = True) -> None:
        """It was asked; `timed`: with work that its round trip is to be learnt from."""
        self._owed[request] = (now, timed)

    def heard(self, request: int, now: float, sound: bool = True) -> None:
        """It replied to `request`; `sound`: with an answer."""
        sent_at, timed = self._owed.pop(request, (now, False))
        self._quiet_since = now
        if not (timed and sound):
            return
        took = now - sent_at
        self._trips.append(took)
        if self.rtt_s is None:
            self.rtt_s, self._varies_s = took, took / 2
        else:
            self._varies_s += (abs(took - self.rtt_s) - self._varies_s) / 4
            self.rtt_s += (took - self.rtt_s) / 8

    def answered_ping(self, request: int, now: float) -> None:
        """It replied to a Ping; a Pong settles nothing else that it owes."""
        if not self._owed.get(request, (now, True))[1]:
            self.heard(request, now)

    def made_sense(self) -> None:
        """An answer of its was of use."""
        self.failures = 0

    def welcomed(self, now: float) -> None:
        """A probe came back well; a welcome that nobody asked for is none."""
        if self._probing:
            self.state, self._quiet_since, self._probing = "alive", now, False

    def failed(self, why: Failure, now: float) -> None:
        """It is asked nothing more until a probe is welcome."""
        self.state, self._probing = why, False
        self.failures += 1
        self._owed.clear()
        self._pause(now)

    def unreachable(self, now: float) -> None:
        """There was no way to send the probe that was due: that costs nobody anything, and is tried again soon."""
        self.failures -= 1
        self._probing, self._probe_at = False, now + FIRST_PAUSE_S

    def returns(self, now: float) -> None:
        """It spoke up by itself: probe it at once. A peer that talked nonsense waits for its pause all the same."""
        if not self.alive and self.state != "wrong":
            self._probe_at = min(self._probe_at, now)

    def _pause(self, now: float) -> None:
        most = MOST_PAUSE_S.get(self.state, 1.0)
        self._probe_at = now + min(FIRST_PAUSE_S * 2 ** min(max(self.failures - 1, 0), 16), most) * (
            0.75 + 0.5 * self._chance()
        )
