"""One device, the whole flow.

    inputs -> latents -> route -> peers -> combine

One thread has the sockets, the expert and every decision; a second one runs the extractor beside it (front.py). What
other threads want is put in an inbox. So nothing that serves is locked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from nmoe_edge import __version__
from nmoe_edge.client import Answers, answers_of, budget_of
from nmoe_edge.common.folders import stamps
from nmoe_edge.common.log import Log
from nmoe_edge.common.memory import trim
from nmoe_edge.common.schema import to_plain
from nmoe_edge.device.dns import Resolver
from nmoe_edge.device.extraction import Extraction
from nmoe_edge.device.membership import Membership, find_membership
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.device.requests import Requests, Rules
from nmoe_edge.device.saved_mix import forget_mix, keep_mix, kept_mix
from nmoe_edge.device.service import Service
from nmoe_edge.device.sockets import Heard, Sockets
from nmoe_edge.errors import BundleError, CallError, EdgeError, FleetError
from nmoe_edge.models import Models, open_bundle
from nmoe_edge.protocol.messages import Answer, Ask, Hello, Infer, Leave, Ping, Reason, Refuse, Report, Result, Status
from nmoe_edge.protocol.tensor import Tensor

_TURN_S = 1.0
"""The longest that the loop sleeps."""
_LOOK_S = 2.0
"""Between two looks at the files."""
_JOBS_A_TURN = 8
"""Requests begun to be routed before the sockets are looked at again: what waits there unseen cannot be refused."""
_WEIGHED, _WEIGHED_S = 64, 1.0
"""Requests, or seconds of work for them, between two looks at what one takes."""
_MOST_BUGS = 100
"""In a row, before the device ends, for whoever watches over it to start it anew."""
_KEEP_S = 30.0
"""Between two times that the class mix is kept, and memory given back."""
_GOODBYE_S = 0.1
DRAIN_S = 5.0
"""The longest that a leaving device finishes what it has begun."""


class Node:
    """A device of a fleet, serving until it is closed."""

    def __init__(
        self,
        bundle: Path | str,
        fleet: Path | str | None = None,
        *,
        listen: str | None = None,
        key: Path | str | None = None,
        rules: Rules | None = None,
        provider: str = "auto",
        threads: int = 1,
        force: bool = False,
        state: Path | None = None,
        forget: bool = False,
        log: Log | None = None,
    ) -> None:
        """Serve the bundle in this folder among the devices of a fleet.toml; without one it answers alone.

        listen: where others connect; None: where the fleet says, nowhere without one. key: this device's key file,
        needed where the fleet has a public key for it. state: a folder that keeps what is learnt across restarts;
        forget: what it has kept.
        """
        self._folder, self._fleet_file = Path(bundle), None if fleet is None else Path(fleet)
        self._rules = rules if rules is not None else Rules()
        self._provider, self._threads, self._force = provider, threads, force
        self._state = state
        self._log = log if log is not None else Log(self._folder.name)
        self._stamp = self._seen = stamps(self._folder, self._fleet_file)
        self._models = open_bundle(self._folder, threads, provider, force, self._log)
        manifest = self._models.manifest
        self._rules.of(manifest)  # what cannot be is known before a socket is open
        self._key = None if key is None else Path(key)
        place = find_membership(self._fleet_file, manifest, self._key)
        if state is not None and forget:
            forget_mix(state, manifest.device)
        self.counts = Metrics()
        self._numbers = itertools.count(secrets.randbits(60))
        where = place.listen if listen is None else listen
        self._sockets = Sockets(where, place.keys, dict(place.allowed), self.counts, self._log)
        self._address = self._sockets.address
        self._inbox: deque[Callable[[float], None]] = deque()
        self.ended = threading.Event()
        """Set when the device serves no more."""
        names = Resolver(lambda device, address: self._told(lambda: self._peers.placed(device, address)))
        self._peers = Peers(self._hello, self._sockets, self._numbers, self.counts, self._log, names.look_up)
        try:
            self._peers.become(place.others)
        except BaseException:
            self._sockets.close()
            raise
        self._service = Service(self._models, self._sockets.reply, self.counts)
        self._front = Extraction(self._sockets.wake)
        self._origin = Requests(self._models, self._rules, self._front, self._peers, self._numbers, self.counts)
        if state is not None:
            kept_mix(state, manifest, self._origin.mix, self._log)
        self._began, self._looked_at, self._kept_at = time.monotonic(), time.monotonic(), time.monotonic()
        self._reload_wanted, self._reload_lock = threading.Event(), threading.Lock()
        self._leaving_at: float | None = None
        self._busy_s = 0.0
        self.broke = False
        """Whether it ended by a bug, once it has."""
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens; empty where it does not."""
        return self._address

    @property
    def models(self) -> Models:
        """What it serves at present."""
        return self._models

    def infer(self, inputs: NDArray[Any], deadline_s: float = 1.0) -> Answers:
        """What the fleet makes of these rows (rows, …); CallError when it cannot."""
        infer = Infer(0, 0, budget_of(deadline_s), Tensor.pack(inputs, inputs.dtype.name))
        done: Future[Result | Refuse] = Future()
        self._do(lambda now: self._begin(infer, done.set_result, now))
        try:
            return answers_of(done.result(deadline_s + DRAIN_S))
        except TimeoutError:
            raise CallError("the node does not answer any more") from None

    def status(self) -> dict[str, Any]:
        """What it says of itself, its peers and its counts."""
        done: Future[dict[str, Any]] = Future()
        self._do(lambda _now: done.set_result(self._facts()))
        try:
            return done.result(DRAIN_S)
        except TimeoutError:
            raise CallError("the node does not answer any more") from None

    def reload(self) -> None:
        """Read bundle and fleet again, beside the serving, and serve them when they pass; else go on with the old."""
        self._reload_wanted.set()
        threading.Thread(target=self._reload, name="reload", daemon=True).start()

    def found(self, name: str, address: str) -> None:
        """A device of the fleet may be at this address; any thread may say so."""
        self._told(lambda: self._peers.found(name, address))

    def leave(self) -> None:
        """Say goodbye, take nothing new, finish what is begun, end: `ended` is set then."""
        if not self.ended.is_set():
            self._do(self._leave)

    def close(self) -> None:
        """Leave, and wait until it is done."""
        self.leave()
        self._thread.join(DRAIN_S + 5)

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _told(self, task: Callable[[], None]) -> None:
        """Something that is of no use to a node that has ended."""
        with contextlib.suppress(CallError):
            self._do(lambda _now: task())

    def _do(self, task: Callable[[float], None]) -> None:
        """Have the node's own thread do something."""
        if self.ended.is_set():
            raise CallError("the node is closed")
        self._inbox.append(task)
        self._sockets.wake()

    def _run(self) -> None:
        bugs = 0
        self.broke = True  # until it ends as it should
        try:
            while self._leaving_at is None or not self._over(self._leaving_at):
                try:
                    self._turn()
                    bugs = 0
                except Exception:  # noqa: BLE001  # a bug of ours: the device goes on, and says it
                    bugs += 1
                    self.counts.events["bugs"] += 1
                    self._log.rarely("bug", traceback.format_exc())
                    if bugs > _MOST_BUGS:
                        return
            self.broke = False
        finally:
            self.ended.set()
            self._leaving_at = self._leaving_at or time.monotonic()
            try:
                while self._inbox:  # whoever waits for it is told
                    self._inbox.popleft()(time.monotonic())
            finally:
                self._origin.abandon()
                self._keep()
                self._front.close()
                self._sockets.close()

    def _turn(self) -> None:
        """Hear what has come, do what is due."""
        more = self._front.finished or self._service
        wake_at = 0.0 if more else min(self._peers.wake_at, self._origin.wake_at)
        began = self._sockets.wait(min(max(0.0, wake_at - time.monotonic()), _TURN_S))
        self._sockets.least_budget_ms = 1000 * self._origin.least_budget_s
        for heard in self._sockets.heard():
            self._hear(heard, time.monotonic())
        heard_at = time.monotonic()
        self._service.run()
        now = time.monotonic()
        served_s = now - heard_at
        while self._inbox:
            self._inbox.popleft()(now)
        if self._front.offered:
            self._front.start()
            now = time.monotonic()
        for job in self._front.done(_JOBS_A_TURN) if self._front.finished else ():
            self._origin.extracted(job, now)
        if now >= self._peers.wake_at:
            for expert in self._peers.tick(now):
                self._origin.lost(expert, now)
        if now >= self._origin.wake_at:
            self._origin.tick(now)
        if now - self._looked_at > _LOOK_S:
            self._look(now)
        if self._origin.open or self._origin.finished:
            self._weigh(time.monotonic() - began - served_s)

    def _weigh(self, busy_s: float) -> None:
        """Learn what a request that ends well takes of this thread, with all that is refused meanwhile."""
        self._busy_s += busy_s
        if self._origin.finished >= _WEIGHED or self._busy_s > _WEIGHED_S:
            self._origin.cost_s = self._busy_s / max(1, self._origin.finished)
            self._origin.finished, self._busy_s = 0, 0.0

    def _hear(self, heard: Heard, now: float) -> None:
        message, request, sender, expert = heard
        if sender is not None and type(message) is Ask and self._leaving_at is None:  # most of what comes
            self._service.offer(sender, message, now)
        elif sender is None:
            reply = self._peers.heard(expert, message, request, now)
            if reply is not None:
                self._origin.answered(reply, expert, now)
        elif isinstance(message, Ask | Ping):
            if self._leaving_at is not None:
                self._sockets.reply(sender, Refuse(message.request, Reason.SHUTTING_DOWN))
            else:
                self._service.offer(sender, message, now)
        elif isinstance(message, Infer):
            self._begin(message, lambda reply: self._sockets.reply(sender, reply), now)
        elif isinstance(message, Hello):
            leaving = self._leaving_at is not None
            welcome = Refuse(0, Reason.SHUTTING_DOWN) if leaving else self._peers.greeted(message, sender, now)
            self._sockets.reply(sender, welcome)
        elif isinstance(message, Leave):
            gone = self._peers.left(message, sender, now)
            if gone is not None:
                self._origin.left(gone)
        elif isinstance(message, Status):
            facts = json.dumps(self._facts(), allow_nan=False)
            self._sockets.reply(sender, Report(message.request, facts))
        elif isinstance(message, Answer | Result | Report | Refuse):
            self.counts.events["replies to nothing"] += 1

    def _begin(self, infer: Infer, reply: Callable[[Result | Refuse], object], now: float) -> None:
        if self._leaving_at is not None:
            reply(Refuse(infer.request, Reason.SHUTTING_DOWN))
        else:
            self._origin.begin(infer, reply, now)

    def _leave(self, now: float) -> None:
        if self._leaving_at is None:
            self._leaving_at = now
            if self.address:
                self._log("leaving", f"{len(self._origin.open)} requests to finish")
            self._peers.say_goodbye(Leave(self._models.manifest.device))

    def _over(self, leaving_at: float) -> bool:
        """Whether the last thing is done that was begun before leaving."""
        left_s = time.monotonic() - leaving_at
        # What peers asked before they heard of it is still on its way.
        return (left_s > _GOODBYE_S and not self._origin.open and not self._service) or left_s > DRAIN_S

    def _look(self, now: float) -> None:
        """What needs a look now and then."""
        self._looked_at = now
        self._origin.sweep(now)
        stamp, before = stamps(self._folder, self._fleet_file), self._seen
        self._seen = stamp
        if stamp != self._stamp and stamp == before:  # nothing is being copied any more
            self._stamp = stamp
            self.reload()
        if now - self._kept_at > _KEEP_S:
            self._kept_at = now
            self._keep()
            trim()

    def _keep(self) -> None:
        if self._state is not None and self._origin.rules.adapt:
            keep_mix(self._state, self._models.manifest, self._origin.mix, self._log)

    def _reload(self) -> None:
        """In a thread of its own, one at a time; one that has begun takes up whatever was wanted until then."""
        with self._reload_lock:
            if self._reload_wanted.is_set() and not self.ended.is_set():
                self._reload_wanted.clear()
                self._read_again()

    def _read_again(self) -> None:
        try:
            models = open_bundle(self._folder, self._threads, self._provider, self._force, self._log)
            self._rules.of(models.manifest)
            place = find_membership(self._fleet_file, models.manifest, self._key)
            if models.manifest.device != self._models.manifest.device:
                raise BundleError(f"{self._folder} is of {models.manifest.device} now")
            if (place.keys is not None) != self._sockets.guarded:
                raise FleetError(f"{self._fleet_file}: keys came or went; that takes a restart")
        except EdgeError as error:
            self.counts.events["reloads refused"] += 1
            self._log("reload", f"goes on with the old bundle: {error}")
            return
        self._told(lambda: self._swap(models, place))

    def _swap(self, models: Models, place: Membership) -> None:
        self._models = self._service.models = models
        self._origin.serve(models, self._rules)
        self._sockets.allow(dict(place.allowed))
        self._peers.become(place.others)
        self.counts.events["reloads"] += 1
        self._log("reload", f"serves {models.manifest.digest[:12]} now", bundle=models.manifest.digest)

    def _hello(self) -> Hello:
        manifest = self._models.manifest
        return Hello(manifest.device, manifest.expert, manifest.trunk_bytes, (), bundle=manifest.digest)

    def _facts(self) -> dict[str, Any]:
        """For a status report."""
        manifest, rules, mix = self._models.manifest, self._origin.rules, self._origin.mix
        return {
            "device": manifest.device,
            "expert": manifest.expert,
            "experts": manifest.experts,
            "address": self.address,
            "bundle": manifest.digest,
            "trunk": manifest.trunk,
            "provider": self._models.provider,
            "threads": self._threads,
            "extractor": manifest.precision.extractor,
            "known_keys": self._sockets.known_keys if self._sockets.guarded else None,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "under_way": len(self._origin.open),
            "version": __version__,
            "input": to_plain(manifest.input),
            "combination": manifest.routing.combination,
            "labels": list(self._models.labels or ()),
            "rules": {
                "top_k": rules.top_k,
                "local_first": rules.local_first,
                "latents": rules.latents,
                "deadline_s": rules.deadline_s,
                "prefer_near": rules.prefer_near,
                "hedge": rules.hedge,
            },
            "class_mix": {
                "adapt": rules.adapt,
                "rows": mix.rows,
                "mix": None if mix.mix is None else [round(share, 4) for share in mix.mix.tolist()],
            },
            "peers": self._peers.facts(),
            **self.counts.facts(),
        }
