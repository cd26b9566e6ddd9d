"""Requests that begin on this device: from an Infer to its Result.

    inputs -> (front) -> latents and scores -> route -> an Ask for each expert -> combine -> Result

The exchange of each request decides who is asked; this is what carries its decisions out, and keeps the time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.limits import MAX_ANSWERED
from nmoe_edge.device.extraction import Extraction, Job
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.errors import LocalProtocolError, ModelError
from nmoe_edge.models import Models
from nmoe_edge.protocol.classmix import ClassMix
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.exchange import Action, Call, Exchange, Fault
from nmoe_edge.protocol.messages import Answer, Ask, Infer, Reason, Refuse, Result, RowAnswer, detail_of
from nmoe_edge.protocol.routing import route
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import DEFAULT_CAPS

LatentType = Literal["int8", "float16", "float32"]
_HEDGES = 0.05
"""Extra asks at most, of all."""
_SAVED_HEDGES = 5.0
_LOADED = 0.6
"""How much of its budget a request may have to wait for others: what one takes is an estimate, and it came some way."""
_SWEPT_S = 2.0
_MOST_BYTES = DEFAULT_CAPS.payload_bytes
_SPARE_ALARMS = 64
_MOST_RESERVE_S = 0.02
"""Of a budget a tenth, but no more, is kept for combining and for the own expert as last resort."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a device answers; None: as its bundle says."""

    top_k: int | None = None
    local_first: float | None = None
    """A row whose own expert is surer than this stays at home; from 1 on none does."""
    adapt: bool | None = None
    latents: LatentType | None = None
    """What latents travel as."""
    deadline_s: float = 1.0
    """The longest that a request may take, whatever its client would wait."""
    prefer_near: float = 0.0
    """What a millisecond of expected answering time takes off a peer's score."""
    hedge: bool = True
    """Whether another expert is asked as well when one is later than usual."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s <= 3600:
            raise ModelError(f"a deadline of {self.deadline_s} s is not over 0 and at most an hour")
        if self.local_first is not None and not 0 <= self.local_first <= 1:
            raise ModelError(f"local-first is {self.local_first}, not a number from 0 to 1")
        if not 0 <= self.prefer_near < float("inf"):
            raise ModelError(f"prefer-near is {self.prefer_near}, not a number from 0 on")

    def of(self, manifest: Manifest) -> Rules:
        """With what the bundle says filled in; ModelError where the two do not fit."""
        routing = manifest.routing
        top_k = routing.top_k if self.top_k is None else self.top_k
        most = min(manifest.experts, MAX_ANSWERED)
        if not 1 <= top_k <= most:
            raise ModelError(f"top-k {top_k} is not in 1..{most}, what this bundle's {manifest.experts} experts allow")
        if self.adapt and manifest.answers_carry_prior:
            raise ModelError("adapt needs experts whose answers carry no prior, and these do")
        return replace(
            self,
            top_k=top_k,
            local_first=routing.local_first if self.local_first is None else self.local_first,
            adapt=routing.adapt if self.adapt is None else self.adapt,
            latents=manifest.latent.dtype if self.latents is None else self.latents,
        )


Reply = Callable[[Result | Refuse], object]


@dataclass(slots=True, eq=False)
class _Request:
    """One that is under way."""

    number: int
    """The client's."""
    trace: int
    reply: Reply
    models: Models
    rules: Rules
    began: float
    deadline: float
    job: Job | None
    """While its inputs wait to be looked at."""
    exchange: Exchange | None = None
    """From then on."""
    latents: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    own: NDArray[np.float32] | None = None
    mix: ClassMix | None = None
    """Of the bundle that it began with, where that adapts."""
    asks: list[int] = field(default_factory=list)
    wake_at: float = 0.0
    closed: bool = False


class Requests:
    """All of them."""

    def __init__(
        self, models: Models, rules: Rules, front: Extraction, peers: Peers, numbers: Iterator[int], counts: Metrics
    ) -> None:
        """Ready for the first."""
        self._front, self._peers, self._numbers, self._counts = front, peers, numbers, counts
        self.wake_at = float("inf")
        """When `tick` is due again."""
        self._by_job: dict[int, _Request] = {}
        self._by_ask: dict[int, tuple[_Request, int]] = {}
        """Ask -> whose it is, and which expert it went to."""
        self._alarms: list[tuple[float, int, _Request]] = []
        self._ties = itertools.count()
        self.open: set[_Request] = set()
        """Requests under way."""
        self._hedges = _SAVED_HEDGES
        self.cost_s = 0.0
        """What a request takes of the node's own thread: who would wait for longer than he has is refused."""
        self.finished = 0
        self.mix, self._trunk = ClassMix(models.manifest.outputs), models.manifest.trunk
        """What this device sees; learnt from only when the rules say so."""
        self.serve(models, rules)

    def serve(self, models: Models, rules: Rules) -> None:
        """Requests that come from now on are answered with these; those under way keep theirs."""
        self._models, self.rules = models, rules.of(models.manifest)
        if models.manifest.trunk != self._trunk:
            self.mix, self._trunk = ClassMix(models.manifest.outputs), models.manifest.trunk

    @property
    def least_budget_s(self) -> float:
        """What a request must be given to be worth beginning, after those that wait already."""
        wait_s = len(self.open) * self.cost_s / _LOADED
        return wait_s if wait_s <= self.rules.deadline_s else float("inf")

    def begin(self, infer: Infer, reply: Reply, now: float) -> None:
        """A request has come."""
        models, rules = self._models, self.rules
        refusal = _objection(infer, models.manifest)
        if refusal is not None:
            self._refuse(infer, reply, Reason.BAD_REQUEST, refusal)
            return
        budget_s = min(infer.budget_ms / 1000, rules.deadline_s)
        if budget_s < self.least_budget_s:
            self._refuse(infer, reply, Reason.BUSY, "")
            return
        deadline = now + budget_s
        own_too = rules.local_first is not None and rules.local_first < 1  # nothing is surer than 1
        job = Job(models, infer.inputs.unpack(), deadline, own_too)
        if not self._front.offer(job, now):
            self._refuse(infer, reply, Reason.BUSY, "")
            return
        request = _Request(infer.request, infer.trace, reply, models, rules, now, deadline, job)
        request.mix = self.mix if rules.adapt else None
        self._by_job[id(job)] = request
        self.open.add(request)
        self._alarm(request, deadline)

    def extracted(self, job: Job, now: float) -> None:
        """The front is done with a request's inputs."""
        request = self._by_job.pop(id(job), None)
        if request is None:
            return
        request.job = None
        if job.error is not None:
            self._close(request, Refuse(request.number, Reason.FAILED, detail_of(job.error)))
        elif job.latents is None or job.scores is None or now >= request.deadline:
            self._close(request, Refuse(request.number, Reason.EXPIRED))
        else:
            self._counts.took("extractor and gate", now - request.began)
            self._start(request, job.latents, job.scores, job.own, now)

    def answered(self, reply: Answer | Refuse, by: int, now: float) -> None:
        """A peer, the one with expert `by`, replied to an Ask."""
        request, asked = self._by_ask.get(reply.request, (None, -1))
        if request is None or request.exchange is None or request.closed:
            self._counts.events["late or unknown answers"] += 1
        elif by != asked:
            self._counts.events["answers in another's name"] += 1
            self._peers.fail(by, "wrong", now)
        elif isinstance(reply, Answer):
            outputs = reply.outputs.unpack()
            actions = request.exchange.answered(reply.request, reply.expert, outputs, now)
            if not any(isinstance(action, Fault) and action.expert == by for action in actions):
                self._peers.made_sense(by)
            self._act(request, actions, now)
        else:
            self._counts.events[f"peers refused {reply.reason.name.lower()}"] += 1
            self._act(request, request.exchange.refused(reply.request, now), now)

    def lost(self, expert: int, now: float) -> None:
        """Nothing more comes from this expert."""
        for request in list(self.open):
            if request.exchange is not None:
                self._act(request, request.exchange.lost(expert, now), now)

    def left(self, expert: int) -> None:
        """Ask this expert nothing more; what it was asked it may still answer."""
        for request in self.open:
            if request.exchange is not None:
                request.exchange.leaving(expert)

    def tick(self, now: float) -> None:
        """Time has passed."""
        while self._alarms and self._alarms[0][0] <= now:
            at, _, request = heapq.heappop(self._alarms)
            if request.closed or at != request.wake_at:
                continue
            if request.exchange is not None:
                self._act(request, request.exchange.tick(now), now)
            else:  # its inputs still wait to be looked at
                self._close(request, Refuse(request.number, Reason.EXPIRED))
        self.wake_at = self._alarms[0][0] if self._alarms else float("inf")

    def sweep(self, now: float) -> None:
        """Refuse what is open though its deadline is long over: only a bug can have left it so."""
        for request in [r for r in self.open if now > r.deadline + _SWEPT_S]:
            self._counts.events["bugs"] += 1
            self._close(request, Refuse(request.number, Reason.FAILED))

    def abandon(self) -> None:
        """Refuse what is under way: nobody will finish it."""
        for request in list(self.open):
            self._close(request, Refuse(request.number, Reason.SHUTTING_DOWN))

    def _start(
        self,
        request: _Request,
        latents: NDArray[np.float32],
        scores: NDArray[np.float32],
        own: NDArray[np.float32] | None,
        now: float,
    ) -> None:
        """Decide where each row goes, and ask.

        latents: (rows, latent); scores: (rows, experts); own: (rows, outputs), where local first wants it
        """
        rules, manifest = request.rules, request.models.manifest
        at_home: set[int] = set()
        if own is not None and rules.local_first is not None:
            at_home = set((softmax(own).max(axis=1) > rules.local_first).nonzero()[0].tolist())
        losses = None
        if rules.prefer_near:
            away_s = [self._peers.expected_s(e) * (e != manifest.expert) for e in range(manifest.experts)]
            losses = rules.prefer_near * 1000 * np.asarray(away_s, np.float32)
        found = route(scores, manifest.expert, self._peers.trusted(now), rules.top_k or 1, at_home, losses)
        reserve = min(_MOST_RESERVE_S, (request.deadline - request.began) / 10)
        request.exchange = Exchange(
            found,
            manifest.outputs,
            self._numbers,
            deadline=request.deadline - reserve,
            patience=self._peers.patience if rules.hedge else lambda _expert: float("inf"),
            may_hedge=self._may_hedge,
            combination=manifest.routing.combination,
        )
        self._counts.events["rows"] += found.rows
        self._counts.events["rows kept at home"] += found.wanted.count((manifest.expert,))
        request.latents, request.own = latents, own
        self._act(request, request.exchange.start(now), now)

    def _act(self, request: _Request, actions: list[Action], now: float) -> None:
        """Do what the exchange says, and what it says of that."""
        exchange = request.exchange
        if exchange is None or request.closed:
            return
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, Fault):
                self._counts.events[f"experts {action.why}"] += 1
                if action.why == "wrong":
                    self._peers.fail(action.expert, "wrong", now)
            elif action.expert == request.models.manifest.expert:
                todo.extend(self._at_home(request, exchange, action, now))
            elif self._ask(request, action, now):
                self._by_ask[action.request] = request, action.expert
                request.asks.append(action.request)
            else:
                todo.extend(exchange.refused(action.request, now))
        if exchange.done:
            self._finish(request, exchange, now)
        else:
            self._alarm(request, exchange.wake_at)

    def _at_home(self, request: _Request, exchange: Exchange, call: Call, now: float) -> list[Action]:
        """The own expert's answer, without a socket."""
        rows = list(call.rows)
        try:
            outputs = request.own[rows] if request.own is not None else request.models.expert(request.latents[rows])
        except ModelError:
            return exchange.refused(call.request, now)
        return exchange.answered(call.request, call.expert, outputs, now)

    def _ask(self, request: _Request, call: Call, now: float) -> bool:
        latents = request.latents[list(call.rows)] if len(call.rows) < len(request.latents) else request.latents
        try:
            packed = Tensor.pack(latents, request.rules.latents or "float16")
        except LocalProtocolError:  # larger than float16 holds
            packed = Tensor.pack(latents, "float32")
        budget_ms = max(1, int((request.deadline - now) * 1000))
        trunk = request.models.manifest.trunk_bytes
        self._hedges = min(self._hedges + _HEDGES, _SAVED_HEDGES)
        self._counts.events["asks"] += 1
        return self._peers.ask(Ask(call.request, request.trace, budget_ms, call.expert, trunk, packed), now)

    def _may_hedge(self) -> bool:
        if self._hedges < 1:
            return False
        self._hedges -= 1
        self._counts.events["hedges"] += 1
        return True

    def _finish(self, request: _Request, exchange: Exchange, now: float) -> None:
        """Every row has its answers: make one of them."""
        outputs, rows = exchange.result()
        if request.mix is not None:
            outputs = _adapted(request.mix, request.models.manifest, outputs, rows)
        own = request.models.manifest.expert
        self._counts.events["rows degraded"] += sum([row.degraded for row in rows])
        self._counts.events["rows nobody answered"] += sum([not row.experts for row in rows])
        remote = any(row.experts != (own,) for row in rows)
        self._counts.took("requests with peers" if remote else "requests at home", now - request.began)
        elapsed_us = min(int((now - request.began) * 1e6), 2**32 - 1)
        self._close(request, Result(request.number, elapsed_us, Tensor.pack(outputs, "float32"), rows))

    def _alarm(self, request: _Request, at: float) -> None:
        if at != request.wake_at and at < float("inf"):
            heapq.heappush(self._alarms, (at, next(self._ties), request))
            self.wake_at = self._alarms[0][0]
        request.wake_at = at

    def _refuse(self, infer: Infer, reply: Reply, reason: Reason, detail: str) -> None:
        self._counts.events[f"requests refused {reason.name.lower()}"] += 1
        reply(Refuse(infer.request, reason, detail_of(detail)))

    def _close(self, request: _Request, reply: Result | Refuse) -> None:
        if request.job is not None:  # its inputs need not be looked at any more
            request.job.dropped = True
            self._by_job.pop(id(request.job), None)
        request.closed, request.job, request.exchange, request.own = True, None, None, None
        request.latents = np.zeros((0, 0), np.float32)  # its alarm may lie in the heap for a while
        self.open.discard(request)
        if len(self._alarms) > 2 * len(self.open) + _SPARE_ALARMS:  # for as long as the deadline of who is answered
            self._alarms = [alarm for alarm in self._alarms if not alarm[2].closed]
            heapq.heapify(self._alarms)
        for number in request.asks:
            self._by_ask.pop(number, None)
        if isinstance(reply, Result):
            self.finished += 1
        else:
            self._counts.events[f"requests refused {reply.reason.name.lower()}"] += 1
        request.reply(reply)


def _adapted(
    mix: ClassMix, manifest: Manifest, outputs: NDArray[np.float32], rows: tuple[RowAnswer, ...]
) -> NDArray[np.float32]:
    """Probabilities, weighed with the device's own class mix. outputs: (rows, outputs)"""
    p = outputs if manifest.routing.combination == "probabilities" else softmax(outputs)
    known = [i for i, row in enumerate(rows) if row.experts]
    weighed = np.zeros_like(outputs)
    if known:
        weighed[known] = mix.weighed(p[known])
    return weighed


def _objection(infer: Infer, manifest: Manifest) -> str | None:
    """Why these are no inputs of this bundle."""
    due, inputs = manifest.input, infer.inputs
    if (inputs.dtype, inputs.shape[1:]) != (due.dtype, due.shape):
        return f"inputs are {inputs.dtype} {list(inputs.shape[1:])}, not {due.dtype} {list(due.shape)}"
    if inputs.shape[0] * max(manifest.latent.dim, manifest.outputs) * 4 > _MOST_BYTES:
        return f"what is made of {inputs.shape[0]} rows is over {_MOST_BYTES} bytes; ask with fewer"
    return None
