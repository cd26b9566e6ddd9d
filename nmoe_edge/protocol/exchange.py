"""One request at its origin: who has been asked, who still owes an answer, and what to do when none comes.

A state machine without socket, clock or thread. Whoever drives it tells it what happened and when (`answered`,
`refused`, `lost`, `tick`); it returns what to do next: Call an expert, or know that one is at Fault. `wake_at` says
when it wants its next `tick`. When it is `done`, every row has an output:

    asked ──answer──▶ in the output
      │
      ├─refused, lost, wrong, silent beyond `patience`──▶ others of the row answered: their weights grow
      │                                                   nobody did: the next alive by gate rank is asked
      └─the deadline──▶ whoever answered counts; a row with nobody is the own expert's

The own expert is called like any other but has no deadline: it needs no network, and it is the last resort. Should
it break too, the row ends as zeros that say that nobody answered; a missing row or a NaN is impossible.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True, slots=True)
class Fault:
    """To know: `expert` did not do what it was asked."""

    expert: int
    why: Literal["silent", "refused", "lost", "wrong"]


Action = Call | Fault


@dataclass(slots=True)
class _Ask:
    """A call that went out."""

    expert: int
    rows: tuple[int, ...]
    overdue_at: float
    open: bool = True
    """Nothing has come back yet."""


class Exchange:
    """The state machine of one request."""

    def __init__(
        self,
        route: Route,
        outputs: int,
        requests: Iterator[int],
        *,
        deadline: float,
        patience: float = math.inf,
        combination: str = "outputs",
    ) -> None:
        """`requests` numbers the calls, uniquely on this device; `deadline` is when waiting for peers ends.

        After `patience` seconds of silence the next expert is asked, while the silent one may still answer.
        Leave what the own expert takes between `deadline` and the client's.
        """
        self.route = route
        self.outputs = outputs
        self.deadline = deadline
        self.stray: Counter[str] = Counter()
        """Answers that changed nothing: "unknown", "duplicate" or "late"."""
        self._patience = patience
        self._requests = requests
        self._combination = combination
        self._asks: dict[int, _Ask] = {}
        self._answers: list[dict[int, NDArray[Any]]] = [{} for _ in range(route.rows)]
        self._waiting: list[set[int]] = [set() for _ in range(route.rows)]
        self._tried: list[set[int]] = [set() for _ in range(route.rows)]
        self._lost: set[int] = set()
        self._open_rows = set(range(route.rows))

    @property
    def done(self) -> bool:
        """Whether every row has its answers."""
        return not self._open_rows

    @property
    def wake_at(self) -> float:
        """When something happens by itself: infinity when only the own expert's answer, or none, is awaited."""
        if not any(self._waiting[row] - {self.route.own} for row in self._open_rows):
            return math.inf
        overdue = [ask.overdue_at for ask in self._asks.values() if self._awaited(ask)]
        return min([self.deadline, *overdue])

    def start(self, now: float) -> list[Action]:
        """Ask every row's chosen experts: one call for each, whatever the number of its rows."""
        in_time = now < self.deadline
        chosen = self.route.chosen if in_time else ((self.route.own,),) * self.route.rows
        return self._call(dict(enumerate(chosen)), now)

    def answered(self, request: int, expert: int, outputs: NDArray[Any], now: float) -> list[Action]:
        """`expert` says this. outputs: (rows, outputs) in the order of the call's rows"""
        ask = self._close(request)
        if ask is None:
            return []
        fits = expert == ask.expert and outputs.shape == (len(ask.rows), self.outputs)
        if not fits or not np.isfinite(outputs).all():
            return [Fault(ask.expert, "wrong"), *self._fail([ask], now)]
        useful = [row for row in ask.rows if row in self._open_rows]
        if not useful:
            self.stray["late"] += 1
        for row, output in zip(ask.rows, outputs, strict=True):
            if row in self._open_rows:
                self._answers[row][ask.expert] = output
                self._waiting[row].discard(ask.expert)
        return self._advance(useful, now)

    def refused(self, request: int, now: float) -> list[Action]:
        """The expert says no, or the own one broke."""
        ask = self._close(request)
        return [] if ask is None else [Fault(ask.expert, "refused"), *self._fail([ask], now)]

    def lost(self, expert: int, now: float) -> list[Action]:
        """The connection to `expert` is gone, or it took its leave: nothing more will come from it."""
        self._lost.add(expert)
        asks = [ask for ask in self._asks.values() if ask.expert == expert and self._awaited(ask)]
        faults: list[Action] = [Fault(expert, "lost")] if asks else []
        return faults + self._fail(asks, now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        late = [ask for ask in self._asks.values() if now >= min(ask.overdue_at, self.deadline) and self._awaited(ask)]
        faults: list[Action] = [Fault(expert, "silent") for expert in dict.fromkeys(ask.expert for ask in late)]
        return faults + self._fail(late, now)

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
            missing = tuple(expert for expert in self.route.wanted[row] if expert not in answers)
            rows.append(RowAnswer(tuple(weights), tuple(weights.values()), missing))
        return outputs, tuple(rows)

    def _awaited(self, ask: _Ask) -> bool:
        """Whether a row still waits for this ask, and time can end that."""
        if not ask.open or ask.expert == self.route.own:
            return False
        return any(row in self._open_rows and ask.expert in self._waiting[row] for row in ask.rows)

    def _close(self, request: int) -> _Ask | None:
        """The open ask that this reply belongs to; None, and counted, when there is none."""
        ask = self._asks.get(request)
        if ask is None:
            self.stray["unknown"] += 1
        elif not ask.open:
            self.stray["duplicate"] += 1
        else:
            ask.open = False
            return ask
        return None

    def _fail(self, asks: Iterable[_Ask], now: float) -> list[Action]:
        """Wait no longer for these; their rows look elsewhere together, so that a substitute gets one call."""
        rows: list[int] = []
        for ask in asks:
            for row in ask.rows:
                self._waiting[row].discard(ask.expert)
            rows += ask.rows
        return self._advance(rows, now)

    def _advance(self, rows: Iterable[int], now: float) -> list[Action]:
        """Close the rows that have what they need; ask on for those that have nobody left."""
        substitutes: dict[int, tuple[int, ...]] = {}
        for row in self._open_rows.intersection(rows):
            waiting = self._waiting[row]
            if self._answers[row] and waiting.isdisjoint(self.route.chosen[row]):
                self._open_rows.discard(row)  # a substitute that was asked as well is waited for no longer
            elif not waiting:
                substitute = self._substitute(row, now)
                if substitute is None:
                    self._open_rows.discard(row)
                else:
                    substitutes[row] = (substitute,)
        return self._call(substitutes, now)

    def _substitute(self, row: int, now: float) -> int | None:
        """The next expert to ask for this row: by gate rank, after the deadline the own one, or nobody is left."""
        own, tried = self.route.own, self._tried[row]
        if now < self.deadline:
            usable = self.route.alive - self._lost - tried
            for expert in self.route.ranking(row):
                if expert in usable:
                    return expert
        return None if own in tried else own

    def _call(self, experts: dict[int, tuple[int, ...]], now: float) -> list[Action]:
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
            overdue_at = math.inf if expert == self.route.own else now + self._patience
            self._asks[call.request] = _Ask(expert, call.rows, overdue_at)
            calls.append(call)
        return calls
