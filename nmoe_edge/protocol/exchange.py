"""One request at its origin: who has been asked, who still owes an answer, and what to do when none comes.

A state machine without socket, clock or thread. Whoever drives it tells it what happened and when (`answered`,
`refused`, `lost`, `leaving`, `tick`); it returns what to do next: Call an expert, or know that one is at Fault.
`wake_at` says when it wants its next `tick`. When it is `done`, every row has an output.

A row needs as many answers as experts were chosen for it.

    refused, lost, wrong   that answer will not come: the others' weights grow; was it the last one hoped for, the
                           next alive by gate rank is asked
    late                   past the patience with this expert the next by rank is asked as well, and whoever answers
                           first counts: hedging
    the deadline           whoever answered counts; a row with nobody is the own expert's

The own expert is called like any other but is never late: it needs no network, and it is the last resort. Should it
break too, the row waits for whoever may still answer and at the deadline ends as zeros that say that nobody answered;
a missing row or a NaN is impossible.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.messages import RowAnswer
from nmoe_edge.protocol.routing import Route


@dataclass(frozen=True, slots=True)
class Call:
    """To do: have `expert` run on these rows. For the own expert without a socket, else one Ask for them all."""

    request: int
    expert: int
    rows: tuple[int, ...]


Why = Literal["silent", "refused", "lost", "wrong"]


@dataclass(frozen=True, slots=True)
class Fault:
    """To know: `expert` did not do what it was asked. At most one for a call."""

    expert: int
    why: Why
    waited_s: float
    """Since the call: a peer that was silent for a millisecond, because the client had no more time, is not dead."""


Action = Call | Fault


@dataclass(slots=True)
class _Ask:
    """A call that went out."""

    expert: int
    rows: tuple[int, ...]
    asked_at: float
    late_at: float
    replied: bool = False
    blamed: bool = False


class Exchange:
    """The state machine of one request."""

    def __init__(
        self,
        route: Route,
        outputs: int,
        requests: Iterator[int],
        *,
        deadline: float,
        patience: Callable[[int], float] = lambda _expert: math.inf,
        may_hedge: Callable[[], bool] = lambda: True,
        combination: str = "outputs",
    ) -> None:
        """`requests` numbers the calls, never twice the same on this device; `deadline` is when waiting for peers ends.

        `patience` is how many seconds an expert may take before another is asked as well, if `may_hedge` then says so.
        Leave what the own expert takes between `deadline` and the client's.
        """
        self.route = route
        self.outputs = outputs
        self.deadline = deadline
        self.stray: Counter[str] = Counter()
        """Replies that changed nothing: "unknown", "duplicate" or "late"."""
        self._patience, self._may_hedge = patience, may_hedge
        self._requests = requests
        self._combination = combination
        self._asks: dict[int, _Ask] = {}
        rows = range(route.rows)
        self._answers: list[dict[int, NDArray[Any]]] = [{} for _ in rows]
        self._waiting: list[set[int]] = [set() for _ in rows]
        self._tried: list[set[int]] = [set() for _ in rows]
        self._gone: set[int] = set()
        self._open_rows = set(rows)

    @property
    def done(self) -> bool:
        """Whether every row has its answers."""
        return not self._open_rows

    @property
    def wake_at(self) -> float:
        """When something happens by itself; infinity when nothing does but the own expert's answer."""
        own = {self.route.own}
        for row in self._open_rows:
            if self._answers[row] or not self._waiting[row] <= own:
                break
        else:
            return math.inf
        return min([self.deadline, *[ask.late_at for ask in self._asks.values() if self._awaited(ask)]])

    def start(self, now: float) -> list[Action]:
        """Ask every row's chosen experts: one call for each, whatever the number of its rows."""
        experts = {}
        for row, chosen in enumerate(self.route.chosen):
            reachable = tuple([expert for expert in chosen if expert not in self._gone]) if now < self.deadline else ()
            experts[row] = reachable or self._substitute(row, now)
        return self._call(experts, now)

    def answered(self, request: int, expert: int, outputs: NDArray[Any], now: float) -> list[Action]:
        """`expert` says this. outputs: (rows, outputs) in the order of the call's rows"""
        ask = self._take(request)
        if ask is None:
            return []
        fits = expert == ask.expert and outputs.shape == (len(ask.rows), self.outputs)
        if not fits or not np.isfinite(outputs).all():
            return self._fail([ask], "wrong", now)
        if self._open_rows.isdisjoint(ask.rows):
            self.stray["late"] += 1
        for row, output in zip(ask.rows, outputs, strict=True):
            if row in self._open_rows:
                self._answers[row][ask.expert] = output
                self._waiting[row].discard(ask.expert)
        return self._advance(ask.rows, now)

    def refused(self, request: int, now: float) -> list[Action]:
        """The expert says no, or the own one broke."""
        ask = self._take(request)
        if ask is not None and self._open_rows.isdisjoint(ask.rows):
            self.stray["late"] += 1
            return []
        return [] if ask is None else self._fail([ask], "refused", now)

    def leaving(self, expert: int) -> None:
        """`expert` takes its leave: it is asked nothing more, but what it was asked it may still answer."""
        self._gone.add(expert)

    def lost(self, expert: int, now: float) -> list[Action]:
        """The connection to `expert` is gone: nothing more will come from it."""
        self._gone.add(expert)
        asks = [ask for ask in self._asks.values() if ask.expert == expert and self._awaited(ask)]
        return self._fail(asks, "lost", now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        awaited = [ask for ask in self._asks.values() if self._awaited(ask)]
        if now >= self.deadline:
            return self._fail(awaited, "silent", now) + self._advance(range(self.route.rows), now)
        late = [ask for ask in awaited if now >= ask.late_at]
        hedges: dict[int, tuple[int, ...]] = {}
        for ask in late:
            ask.late_at = math.inf
            waiting = [r for r in self._open_rows.intersection(ask.rows) if ask.expert in self._waiting[r]]
            others = {row: self._substitute(row, now) for row in waiting if row not in hedges}
            wanted = sorted({expert for found in others.values() for expert in found})
            granted = {expert for expert in wanted if self._may_hedge()}  # each is a message more
            hedges |= {row: found for row, found in others.items() if granted.issuperset(found)}
        return self._call(hedges, now)

    def result(self) -> tuple[NDArray[np.float32], tuple[RowAnswer, ...]]:
        """Every row's output and how it came about: (rows, outputs), and a RowAnswer a row."""
        if not self.done:
            raise LocalProtocolError(f"{len(self._open_rows)} rows still wait for an answer")
        outputs = np.zeros((self.route.rows, self.outputs), np.float32)
        rows = []
        for row, answers in enumerate(self._answers):
            weights = expert_weights(self.route.scores[row], list(answers)) if answers else {}
            if answers:
                outputs[row] = combine(answers, weights, self._combination)
            missing = tuple([expert for expert in self.route.wanted[row] if expert not in answers])
            rows.append(RowAnswer(tuple(weights), tuple(weights.values()), missing))
        return outputs, tuple(rows)

    def _awaited(self, ask: _Ask) -> bool:
        """Whether a row still waits for this ask, and time can end that."""
        if ask.replied or ask.expert == self.route.own:
            return False
        return any(row in self._open_rows and ask.expert in self._waiting[row] for row in ask.rows)

    def _take(self, request: int) -> _Ask | None:
        """The ask that this reply belongs to; None, and counted, when there is none or it has been replied to."""
        ask = self._asks.get(request)
        if ask is None or ask.replied:
            self.stray["unknown" if ask is None else "duplicate"] += 1
            return None
        ask.replied = True
        return ask

    def _fail(self, asks: list[_Ask], why: Why, now: float) -> list[Action]:
        """Wait no longer for these; their rows look elsewhere together, so that a substitute gets one call."""
        rows: list[int] = []
        faults: list[Action] = []
        for ask in asks:
            for row in ask.rows:
                self._waiting[row].discard(ask.expert)
            rows += ask.rows
            if not ask.blamed:
                ask.blamed = True
                faults.append(Fault(ask.expert, why, now - ask.asked_at))
        return faults + self._advance(rows, now)

    def _advance(self, rows: Iterable[int], now: float) -> list[Action]:
        """Close the rows that have what they need; ask on for those that have nobody left."""
        substitutes: dict[int, tuple[int, ...]] = {}
        for row in self._open_rows.intersection(rows):
            answers, waiting = self._answers[row], self._waiting[row]
            enough = len(answers) >= len(self.route.chosen[row]) or not waiting or now >= self.deadline
            if answers and enough:
                self._open_rows.discard(row)
            elif not waiting:
                substitutes[row] = self._substitute(row, now)
                if not substitutes[row]:
                    self._open_rows.discard(row)
        return self._call(substitutes, now)

    def _substitute(self, row: int, now: float) -> tuple[int, ...]:
        """The next expert to ask for this row, if any: by gate rank, after the deadline the own one alone."""
        own, tried = self.route.own, self._tried[row]
        if now >= self.deadline:
            return () if own in tried else (own,)
        usable = self.route.alive - self._gone - tried | ({own} - tried)
        return tuple(expert for expert in self.route.ranking(row) if expert in usable)[:1]

    def _call(self, experts: Mapping[int, tuple[int, ...]], now: float) -> list[Action]:
        """One call for each distinct expert. experts: row -> whom to ask"""
        rows: defaultdict[int, list[int]] = defaultdict(list)
        for row in sorted(experts):
            for expert in experts[row]:
                rows[expert].append(row)
                self._tried[row].add(expert)
                self._waiting[row].add(expert)
        calls: list[Action] = []
        for expert, its_rows in rows.items():
            call = Call(next(self._requests), expert, tuple(its_rows))
            late_at = math.inf if expert == self.route.own else now + self._patience(expert)
            self._asks[call.request] = _Ask(expert, call.rows, now, late_at)
            calls.append(call)
        return calls
