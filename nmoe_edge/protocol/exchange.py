"""One request on the device that received it: which experts are asked, which answers count, what follows a failure.

A state machine without socket, clock or thread. The caller reports what happened and when; each report returns the
actions to take: a `Call` asks an expert about some rows, a `Fault` says that an expert failed. Sending messages,
keeping time and judging peers are the caller's job.

`start` calls every expert that the route chose, once, with all of its rows. From then on each row is *open* until it
has as many answers as experts were chosen for it, then *closed*. The request is `done` when all rows are closed, and
`result` combines the answers of each.

    event                  what happens to the open rows of that call             actions
    ---------------------  -----------------------------------------------------  ------------------------------
    answered               the answer counts; a row with all its answers closes   -
    answered, but unsound  as for refused                                         Fault "wrong", perhaps a Call
    refused                the row stops waiting for this expert                  Fault "refused", perhaps a Call
    lost                   the same for every unanswered call to this expert      Fault "lost", perhaps Calls
    leaving                nothing: the expert may still answer                   -
    tick, a call is late   the next expert is asked as well (a hedge); the first  perhaps a Call
                           answers to arrive count
    tick at the deadline   the row stops waiting for peers; with an answer it     Fault "silent", perhaps a Call
                           closes

A row that stops waiting for an expert still waits for the others that it asked. Once it waits for none, it closes with
the answers it has, and their weights grow to sum to 1. With no answer at all it asks a substitute: the next expert by
gate rank that is reachable and was not asked for this row. After the deadline only the device's own expert is a
substitute.

The own expert is called like any other but is never late, because it needs no network. A row without any answer waits
for it beyond the deadline. If it fails too, the row closes as zeros that name no expert. No row is ever missing or NaN.

`wake_at` says when the next `tick` is needed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
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
    """Run `expert` on these rows: a peer's with one Ask, the device's own without a socket."""

    request: int
    expert: int
    rows: tuple[int, ...]


Why = Literal["silent", "refused", "lost", "wrong"]


@dataclass(frozen=True, slots=True)
class Fault:
    """`expert` did not answer its call. Reported at most once per call."""

    expert: int
    why: Why
    waited_s: float
    """Seconds since the call. A peer that was silent for a millisecond, because the budget ended then, is not dead."""


Action = Call | Fault


@dataclass(slots=True)
class _Sent:
    """A call that was made, and what came of it so far."""

    expert: int
    rows: tuple[int, ...]
    sent_at: float
    late_at: float
    """When to hedge it; infinity once that is done."""
    replied: bool = False
    faulted: bool = False


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
        """Nothing is asked before `start`.

        outputs: numbers in one answer
        requests: numbers for the calls, unique on this device
        deadline: when waiting for peers ends; leave time for the own expert between it and the client's deadline
        patience: expert -> seconds after which its call is late
        may_hedge: asked before each hedge; False forbids it
        """
        self.route = route
        self.outputs = outputs
        self.deadline = deadline
        self.stray: Counter[str] = Counter()
        """Replies that changed nothing: "unknown", "duplicate" or "late"."""
        self._patience = patience
        self._may_hedge = may_hedge
        self._requests = requests
        self._combination = combination
        self._sent: dict[int, _Sent] = {}  # request number -> call
        self._gone: set[int] = set()  # experts that are asked nothing more
        # By row: answers by expert, experts it waits for, experts it has asked.
        self._answers: list[dict[int, NDArray[Any]]] = [{} for _ in range(route.rows)]
        self._waiting: list[set[int]] = [set() for _ in range(route.rows)]
        self._tried: list[set[int]] = [set() for _ in range(route.rows)]
        self._open_rows = set(range(route.rows))

    @property
    def done(self) -> bool:
        """Whether every row is closed."""
        return not self._open_rows

    @property
    def wake_at(self) -> float:
        """When to call `tick` next; infinity while time changes nothing."""
        own = {self.route.own}
        # A row with an answer is closed by the deadline, and one that waits for a peer is sent to the own expert.
        if all(not self._answers[row] and self._waiting[row] <= own for row in self._open_rows):
            return math.inf
        return min([self.deadline, *[call.late_at for call in self._sent.values() if self._awaited(call)]])

    def start(self, now: float) -> list[Action]:
        """Call the chosen experts of every row: one call per expert, whatever the number of its rows."""
        pairs: list[tuple[int, int]] = []
        for row, chosen in enumerate(self.route.chosen):
            experts = [expert for expert in chosen if expert not in self._gone] if now < self.deadline else []
            if not experts:
                substitute = self._substitute(row, now)
                experts = [] if substitute is None else [substitute]
            pairs += [(row, expert) for expert in experts]
        return self._call(pairs, now)

    def answered(self, request: int, expert: int, outputs: NDArray[Any], now: float) -> list[Action]:
        """`expert` answered call `request`. outputs: (rows, outputs), in the order of the call's rows"""
        call = self._take(request)
        if call is None:
            return []
        fits = expert == call.expert and outputs.shape == (len(call.rows), self.outputs)
        if not fits or not np.isfinite(outputs).all():
            return self._fail([call], "wrong", now)
        if self._open_rows.isdisjoint(call.rows):
            self.stray["late"] += 1
        for row, output in zip(call.rows, outputs, strict=True):
            if row in self._open_rows:
                self._answers[row][call.expert] = output
                self._waiting[row].discard(call.expert)
        return self._advance(call.rows, now)

    def refused(self, request: int, now: float) -> list[Action]:
        """Call `request` was refused by a peer, could not be sent, or the own expert failed."""
        call = self._take(request)
        if call is None:
            return []
        if self._open_rows.isdisjoint(call.rows):
            self.stray["late"] += 1
            return []
        return self._fail([call], "refused", now)

    def leaving(self, expert: int) -> None:
        """`expert` is shutting down: it gets no further call, but may still answer those it has."""
        self._gone.add(expert)

    def lost(self, expert: int, now: float) -> list[Action]:
        """The connection to `expert` is gone: it answers nothing more."""
        self._gone.add(expert)
        calls = [call for call in self._sent.values() if call.expert == expert and self._awaited(call)]
        return self._fail(calls, "lost", now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: hedge late calls, and at the deadline stop waiting for peers."""
        awaited = [call for call in self._sent.values() if self._awaited(call)]
        if now >= self.deadline:
            return self._fail(awaited, "silent", now) + self._advance(range(self.route.rows), now)
        hedges: dict[int, int] = {}  # row -> expert
        for call in awaited:
            if now >= call.late_at:
                call.late_at = math.inf
                hedges |= self._hedge(call, hedges, now)
        return self._call(sorted(hedges.items()), now)

    def result(self) -> tuple[NDArray[np.float32], tuple[RowAnswer, ...]]:
        """The outputs, (rows, outputs), and for each row which experts they came from."""
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

    def _awaited(self, call: _Sent) -> bool:
        """Whether an open row waits for this call to a peer."""
        if call.replied or call.expert == self.route.own:
            return False
        return any(row in self._open_rows and call.expert in self._waiting[row] for row in call.rows)

    def _take(self, request: int) -> _Sent | None:
        """The call that a reply belongs to; None, and counted as stray, when there is none or it has its reply."""
        call = self._sent.get(request)
        if call is None:
            self.stray["unknown"] += 1
            return None
        if call.replied:
            self.stray["duplicate"] += 1
            return None
        call.replied = True
        return call

    def _fail(self, calls: list[_Sent], why: Why, now: float) -> list[Action]:
        """Stop waiting for these calls. Their rows advance together, so that a common substitute gets one call."""
        rows: list[int] = []
        faults: list[Action] = []
        for call in calls:
            for row in call.rows:
                self._waiting[row].discard(call.expert)
            rows += call.rows
            if not call.faulted:
                call.faulted = True
                faults.append(Fault(call.expert, why, now - call.sent_at))
        return faults + self._advance(rows, now)

    def _advance(self, rows: Iterable[int], now: float) -> list[Action]:
        """Close the rows that have what they need; call a substitute for those with no answer and none expected."""
        substitutes: list[tuple[int, int]] = []
        for row in self._open_rows.intersection(rows):
            answers, waiting = self._answers[row], self._waiting[row]
            if answers:
                if len(answers) >= len(self.route.chosen[row]) or not waiting or now >= self.deadline:
                    self._open_rows.discard(row)
            elif not waiting:
                substitute = self._substitute(row, now)
                if substitute is None:
                    self._open_rows.discard(row)
                else:
                    substitutes.append((row, substitute))
        return self._call(sorted(substitutes), now)

    def _hedge(self, late: _Sent, hedges: dict[int, int], now: float) -> dict[int, int]:
        """Row -> expert to ask as well, for the rows of a late call that have no hedge yet."""
        wanted: dict[int, int] = {}
        for row in self._open_rows.intersection(late.rows):
            if late.expert in self._waiting[row] and row not in hedges:
                substitute = self._substitute(row, now)
                if substitute is not None:
                    wanted[row] = substitute
        granted = set()
        for expert in sorted(set(wanted.values())):
            if self._may_hedge():  # each expert is one more message
                granted.add(expert)
        return {row: expert for row, expert in wanted.items() if expert in granted}

    def _substitute(self, row: int, now: float) -> int | None:
        """The best expert by gate rank that this row can still ask; after the deadline only the own one."""
        own, tried = self.route.own, self._tried[row]
        if now >= self.deadline:
            return None if own in tried else own
        usable = self.route.alive - self._gone - tried | ({own} - tried)
        for expert in self.route.ranking(row):
            if expert in usable:
                return expert
        return None

    def _call(self, pairs: Iterable[tuple[int, int]], now: float) -> list[Action]:
        """One call for each distinct expert. pairs: (row, expert), by row"""
        rows: defaultdict[int, list[int]] = defaultdict(list)
        for row, expert in pairs:
            rows[expert].append(row)
            self._tried[row].add(expert)
            self._waiting[row].add(expert)
        actions: list[Action] = []
        for expert, its_rows in rows.items():
            call = Call(next(self._requests), expert, tuple(its_rows))
            late_at = math.inf if expert == self.route.own else now + self._patience(expert)
            self._sent[call.request] = _Sent(expert, call.rows, now, late_at)
            actions.append(call)
        return actions
