"""The requests that clients send to this device, from an Infer to its Result.

    inputs -> (extraction) -> latents and scores -> route -> an Ask per expert -> combine -> Result

The Exchange of each request decides which experts are asked. This module carries its decisions out and keeps the time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.device.extraction import Extraction, Job
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.device.rules import GATE_ALONE, ResolvedRules
from nmoe_edge.errors import LocalProtocolError, ModelError
from nmoe_edge.models import Models
from nmoe_edge.protocol.answering import local_rows, probabilities
from nmoe_edge.protocol.classmix import ClassMix
from nmoe_edge.protocol.exchange import Action, Call, Exchange, Fault
from nmoe_edge.protocol.messages import (
    Answer,
    Ask,
    Infer,
    Reason,
    Refuse,
    Result,
    RowAnswer,
    microseconds,
    refusal_detail,
)
from nmoe_edge.protocol.routing import route
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import DEFAULT_CAPS

_HEDGES_PER_ASK = 0.05
"""Hedges are at most this share of all Asks."""
_MAX_SAVED_HEDGES = 5.0
"""Hedges that may be saved up and then sent at once."""
_MAX_WAIT_SHARE = 0.6
"""The share of its budget that a request may wait for others. The rest covers the estimate's error and the network."""
_SWEEP_S = 2.0
"""A request still open this much longer than its deadline is a bug; `sweep` refuses it."""
_MAX_BYTES = DEFAULT_CAPS.payload_bytes
_SPARE_ALARMS = 64
_RESERVE_SHARE = 0.1
_MAX_RESERVE_S = 0.02
"""A tenth of a request's time, but no more than this, is kept for its own expert as last resort and for combining."""
_NEVER = float("inf")

Reply = Callable[[Result | Refuse], object]


@dataclass(slots=True, eq=False)
class _Request:
    """A request that is not answered yet."""

    number: int
    """The client's number for it."""
    trace: int
    reply: Reply
    models: Models
    rules: ResolvedRules
    began: float
    deadline: float
    job: Job | None
    """Set until extraction is done."""
    exchange: Exchange | None = None
    """Set once extraction is done."""
    latents: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(rows, latent)"""
    own: NDArray[np.float32] | None = None
    """(rows, outputs): the own expert's answers, when extraction computed them."""
    mix: ClassMix | None = None
    """The class mix of the bundle that it began with, when that adapts."""
    asks: list[int] = field(default_factory=list)
    """Numbers of the Asks sent for it."""
    wake_at: float = 0.0
    closed: bool = False


class Requests:
    """All open requests of this device."""

    def __init__(
        self,
        models: Models,
        rules: ResolvedRules,
        extraction: Extraction,
        peers: Peers,
        numbers: Iterator[int],
        metrics: Metrics,
    ) -> None:
        """numbers: the numbers of Asks, never the same twice on this device."""
        self._extraction = extraction
        self._peers = peers
        self._numbers = numbers
        self._metrics = metrics
        self._models = models
        self.rules = rules
        self.mix = ClassMix(models.manifest.outputs)
        """The class mix of this device; it learns only when the rules say so."""
        self._mix_trunk = models.manifest.trunk

        self.open: set[_Request] = set()
        """The requests under way."""
        self._by_job: dict[int, _Request] = {}
        self._by_ask: dict[int, tuple[_Request, int]] = {}
        """Number of an Ask -> its request, and the expert it went to."""
        self._alarms: list[tuple[float, int, _Request]] = []
        """A heap of (time, tie-breaker, request)."""
        self._ties = itertools.count()
        self.wake_at = _NEVER
        """When `tick` must be called."""

        self._saved_hedges = _MAX_SAVED_HEDGES
        self.cost_s = 0.0
        """Seconds of the node's thread per request, measured by the node."""
        self.finished = 0
        """Requests answered since the node last reset this."""

    def serve(self, models: Models, rules: ResolvedRules) -> None:
        """Use these models and rules for new requests; requests under way keep theirs."""
        self._models = models
        self.rules = rules
        if models.manifest.trunk != self._mix_trunk:
            self.mix = ClassMix(models.manifest.outputs)
            self._mix_trunk = models.manifest.trunk

    @property
    def min_budget_s(self) -> float:
        """The smallest budget that a new request needs, given those that wait already; infinity: refuse all."""
        wait_s = len(self.open) * self.cost_s / _MAX_WAIT_SHARE
        return wait_s if wait_s <= self.rules.deadline_s else _NEVER

    def begin(self, infer: Infer, reply: Reply, now: float) -> None:
        """Start a new request, or refuse it at once."""
        models = self._models
        rules = self.rules
        objection = _objection(infer, models.manifest)
        if objection is not None:
            self._refuse(infer, reply, Reason.BAD_REQUEST, objection)
            return
        budget_s = min(infer.budget_ms / 1000, rules.deadline_s)
        if budget_s < self.min_budget_s:
            self._refuse(infer, reply, Reason.BUSY, "")
            return
        deadline = now + budget_s
        job = Job(models, infer.inputs.unpack(), deadline, with_own=rules.local_first < GATE_ALONE)
        if not self._extraction.offer(job, now):
            self._refuse(infer, reply, Reason.BUSY, "")
            return
        request = _Request(infer.request, infer.trace, reply, models, rules, now, deadline, job)
        request.mix = self.mix if rules.adapt else None
        self._by_job[id(job)] = request
        self.open.add(request)
        self._set_alarm(request, deadline)

    def extraction_done(self, job: Job, now: float) -> None:
        """Extraction is done with the inputs of a request."""
        request = self._by_job.pop(id(job), None)
        if request is None:
            return
        request.job = None
        if job.error is not None:
            self._close(request, Refuse(request.number, Reason.FAILED, refusal_detail(job.error)))
        elif job.latents is None or job.scores is None or now >= request.deadline:
            self._close(request, Refuse(request.number, Reason.EXPIRED))
        else:
            self._metrics.took("extraction", now - request.began)
            self._start_exchange(request, job, job.latents, job.scores, now)

    def answered(self, reply: Answer | Refuse, by: int, now: float) -> None:
        """The peer with expert `by` replied to an Ask."""
        request, asked = self._by_ask.get(reply.request, (None, -1))
        if request is None or request.exchange is None or request.closed:
            self._metrics.counts["answers_late"] += 1
        elif by != asked:
            self._metrics.counts["answers_unexpected"] += 1
            self._peers.fail(by, "wrong", now)
        elif isinstance(reply, Answer):
            outputs = reply.outputs.unpack()
            actions = request.exchange.answered(reply.request, reply.expert, outputs, now)
            if not any(isinstance(action, Fault) and action.expert == by for action in actions):
                self._peers.answer_used(by)
            self._act(request, actions, now)
        else:
            self._metrics.counts[f"answers_refused_{reply.reason.name.lower()}"] += 1
            self._act(request, request.exchange.refused(reply.request, now), now)

    def lost(self, expert: int, now: float) -> None:
        """The peer with this expert is lost: no request waits for it any longer."""
        for request in list(self.open):
            if request.exchange is not None:
                self._act(request, request.exchange.lost(expert, now), now)

    def left(self, expert: int) -> None:
        """The peer with this expert is leaving: it is asked nothing new, but may still answer earlier Asks."""
        for request in self.open:
            if request.exchange is not None:
                request.exchange.leaving(expert)

    def tick(self, now: float) -> None:
        """Handle the alarms that have passed: late peers and deadlines."""
        while self._alarms and self._alarms[0][0] <= now:
            at, _, request = heapq.heappop(self._alarms)
            if request.closed or at != request.wake_at:
                continue
            if request.exchange is not None:
                self._act(request, request.exchange.tick(now), now)
            else:  # it still waits for extraction
                self._close(request, Refuse(request.number, Reason.EXPIRED))
        self.wake_at = self._alarms[0][0] if self._alarms else _NEVER

    def sweep(self, now: float) -> None:
        """Refuse requests that are open long after their deadline; only a bug leaves one."""
        forgotten = [request for request in self.open if now > request.deadline + _SWEEP_S]
        for request in forgotten:
            self._metrics.counts["bugs"] += 1
            self._close(request, Refuse(request.number, Reason.FAILED))

    def abandon(self) -> None:
        """Refuse everything that is under way: the device ends."""
        for request in list(self.open):
            self._close(request, Refuse(request.number, Reason.SHUTTING_DOWN))

    def _start_exchange(
        self,
        request: _Request,
        job: Job,
        latents: NDArray[np.float32],
        scores: NDArray[np.float32],
        now: float,
    ) -> None:
        """Choose the experts of each row and ask them. latents: (rows, latent); scores: (rows, experts), of the job"""
        rules = request.rules
        manifest = request.models.manifest
        local: set[int] = set()
        if job.own is not None:
            local = set(local_rows(job.own, rules, job.distances).nonzero()[0].tolist())
        penalties = None
        if rules.prefer_near:
            away_s = [self._peers.expected_s(e) * (e != manifest.expert) for e in range(manifest.experts)]
            penalties = rules.prefer_near * 1000 * np.asarray(away_s, np.float32)  # (experts,)
        routed = route(scores, manifest.expert, self._peers.trusted(now), rules.top_k, local, penalties)
        reserve_s = min(_MAX_RESERVE_S, (request.deadline - request.began) * _RESERVE_SHARE)
        request.exchange = Exchange(
            routed,
            manifest.outputs,
            self._numbers,
            deadline=request.deadline - reserve_s,
            patience=self._peers.patience if rules.hedge else lambda _expert: _NEVER,
            may_hedge=self._may_hedge,
            combination=manifest.routing.combination,
        )
        self._metrics.counts["rows"] += routed.rows
        self._metrics.counts["rows_local"] += routed.wanted.count((manifest.expert,))
        request.latents = latents
        request.own = job.own
        self._act(request, request.exchange.start(now), now)

    def _act(self, request: _Request, actions: list[Action], now: float) -> None:
        """Carry out what the exchange decided, and whatever it decides next because of that."""
        exchange = request.exchange
        if exchange is None or request.closed:
            return
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, Fault):
                self._metrics.counts[f"calls_{action.why}"] += 1
                if action.why == "wrong":
                    self._peers.fail(action.expert, "wrong", now)
            elif action.expert == request.models.manifest.expert:
                todo.extend(self._run_own_expert(request, exchange, action, now))
            elif self._ask(request, action, now):
                self._by_ask[action.request] = request, action.expert
                request.asks.append(action.request)
            else:
                todo.extend(exchange.refused(action.request, now))
        if exchange.done:
            self._finish(request, exchange, now)
        else:
            self._set_alarm(request, exchange.wake_at)

    def _run_own_expert(self, request: _Request, exchange: Exchange, call: Call, now: float) -> list[Action]:
        """Answer a call with this device's own expert."""
        rows = list(call.rows)
        try:
            outputs = request.own[rows] if request.own is not None else request.models.expert(request.latents[rows])
        except ModelError:
            return exchange.refused(call.request, now)
        return exchange.answered(call.request, call.expert, outputs, now)

    def _ask(self, request: _Request, call: Call, now: float) -> bool:
        """Send the Ask for a call; False when the peer cannot be reached."""
        latents = request.latents[list(call.rows)] if len(call.rows) < len(request.latents) else request.latents
        try:
            packed = Tensor.pack(latents, request.rules.latents)
        except LocalProtocolError:  # a value is too large for float16
            packed = Tensor.pack(latents, "float32")
        budget_ms = max(1, int((request.deadline - now) * 1000))
        trunk = request.models.manifest.trunk_bytes
        if not self._peers.ask(Ask(call.request, request.trace, budget_ms, call.expert, trunk, packed), now):
            return False
        self._metrics.counts["asks"] += 1
        self._saved_hedges = min(self._saved_hedges + _HEDGES_PER_ASK, _MAX_SAVED_HEDGES)
        return True

    def _may_hedge(self) -> bool:
        if self._saved_hedges < 1:
            return False
        self._saved_hedges -= 1
        self._metrics.counts["hedges"] += 1
        return True

    def _finish(self, request: _Request, exchange: Exchange, now: float) -> None:
        """Every row has its answers: send the Result."""
        outputs, rows = exchange.result()
        if request.mix is not None:
            outputs = _apply_class_mix(request.mix, request.models.manifest, outputs, rows)
        own = request.models.manifest.expert
        self._metrics.counts["rows_degraded"] += sum([row.degraded for row in rows])
        self._metrics.counts["rows_unanswered"] += sum([not row.experts for row in rows])
        remote = any(row.experts != (own,) for row in rows)
        self._metrics.took("request_remote" if remote else "request_local", now - request.began)
        elapsed_us = microseconds(now - request.began)
        self._close(request, Result(request.number, elapsed_us, Tensor.pack(outputs, "float32"), rows))

    def _set_alarm(self, request: _Request, at: float) -> None:
        if at != request.wake_at and at < _NEVER:
            heapq.heappush(self._alarms, (at, next(self._ties), request))
            self.wake_at = self._alarms[0][0]
        request.wake_at = at

    def _refuse(self, infer: Infer, reply: Reply, reason: Reason, detail: str) -> None:
        self._metrics.counts[f"requests_refused_{reason.name.lower()}"] += 1
        reply(Refuse(infer.request, reason, refusal_detail(detail)))

    def _close(self, request: _Request, reply: Result | Refuse) -> None:
        """Send the reply and forget the request."""
        if request.job is not None:  # its extraction is not needed any more
            request.job.dropped = True
            self._by_job.pop(id(request.job), None)
        request.closed = True
        request.job = None
        request.exchange = None
        # An alarm may hold the request until its deadline; it must not hold the arrays.
        request.own = None
        request.latents = np.zeros((0, 0), np.float32)
        self.open.discard(request)
        if len(self._alarms) > 2 * len(self.open) + _SPARE_ALARMS:
            self._alarms = [alarm for alarm in self._alarms if not alarm[2].closed]
            heapq.heapify(self._alarms)
        for number in request.asks:
            self._by_ask.pop(number, None)
        if isinstance(reply, Result):
            self.finished += 1
        else:
            self._metrics.counts[f"requests_refused_{reply.reason.name.lower()}"] += 1
        request.reply(reply)


def _apply_class_mix(
    mix: ClassMix, manifest: Manifest, outputs: NDArray[np.float32], rows: tuple[RowAnswer, ...]
) -> NDArray[np.float32]:
    """Probabilities weighted with the device's class mix, which learns from them. outputs: (rows, outputs)"""
    p = probabilities(outputs, manifest.routing.combination)
    answered = [i for i, row in enumerate(rows) if row.experts]
    weighted = np.zeros_like(outputs)
    if answered:
        weighted[answered] = mix.reweight(p[answered])
    return weighted


def _objection(infer: Infer, manifest: Manifest) -> str | None:
    """Why this bundle cannot process these inputs; None when it can."""
    expected = manifest.input
    inputs = infer.inputs
    if (inputs.dtype, inputs.shape[1:]) != (expected.dtype, expected.shape):
        return f"inputs are {inputs.dtype} {list(inputs.shape[1:])}, not {expected.dtype} {list(expected.shape)}"
    if inputs.shape[0] * max(manifest.latent.dim, manifest.outputs) * 4 > _MAX_BYTES:
        return f"latents or outputs of {inputs.shape[0]} rows are over {_MAX_BYTES} bytes; ask with fewer rows"
    return None
