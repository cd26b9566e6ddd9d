"""One device of a fleet, the whole flow:

    inputs -> latents -> route -> peers -> combine

One thread owns the sockets, runs the expert and makes every decision; a second one runs the extractor (extraction.py).
Other threads put tasks into an inbox that the first one empties, so the parts below need no locks.
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
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nmoe_edge.bundle.fleet import Device
from nmoe_edge.client import Answers, answers_of, budget_of
from nmoe_edge.common.log import Log, LoggingLog
from nmoe_edge.common.memory import trim
from nmoe_edge.device.dns import Resolver
from nmoe_edge.device.extraction import Extraction
from nmoe_edge.device.files import Reloader, Served, ServedFiles
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.device.report import status_report
from nmoe_edge.device.requests import Requests
from nmoe_edge.device.rules import Rules
from nmoe_edge.device.saved_mix import forget_mix, load_mix, save_mix
from nmoe_edge.device.service import Service
from nmoe_edge.device.sockets import Received, Sockets
from nmoe_edge.errors import CallError
from nmoe_edge.models import Models
from nmoe_edge.protocol.messages import Answer, Ask, Hello, Infer, Leave, Ping, Reason, Refuse, Report, Result, Status
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.status import StatusReport

_MAX_TURN_S = 1.0
"""The loop sleeps no longer than this."""
_LOOK_S = 2.0  # between two looks at the files
_EXTRACTED_PER_TURN = 8
"""Extracted requests routed per turn. Turns stay short: a request that waits unread in a socket cannot be refused."""
_MEASURED_REQUESTS = 64
_MEASURED_S = 1.0
"""The cost of a request is measured over this many requests, or this many seconds of work."""
_MAX_BUGS = 100
"""After this many exceptions in a row the device ends, and its supervisor can restart it."""
_SAVE_S = 30.0
"""Seconds between two times that the class mix is saved and memory is given back."""
_GOODBYE_S = 0.1
"""A leaving device serves at least this long: Asks that peers sent before its goodbye are still on their way."""
DRAIN_S = 5.0
"""A leaving device finishes open work for no longer than this."""


class Node:
    """A device of a fleet. It serves from its creation until it is closed; any thread may call its methods.

        with Node("bundles/digits/device-00", "bundles/digits/fleet.toml") as node:
            answers = node.infer(images)  # uint8 (rows, 1, 8, 8)
            print(node.status()["peers"])

    Without a fleet it answers alone and opens no port. Events go to Python's logging, logger "nmoe".
    """

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
        """Read the bundle in this folder, check it and start to serve it.

        fleet: the fleet.toml that names this device and its peers; None: answer alone.
        listen: the address to bind, tcp://HOST:PORT; None: as fleet.toml says.
        key: this device's key file; None: the usual place, if fleet.toml has a public key for it.
        rules: what may differ from the bundle's own rules.
        provider: runs the graphs: auto, cpu, cuda or tensorrt. threads: CPU threads of each graph.
        force: serve although the bundle fails its self-test on this machine.
        state: the folder in which the class mix survives restarts; None: it does not. forget: delete it first;
            EdgeError when that fails.
        log: where events go; None: Python's logging.

        Raises an EdgeError that says what to do: BundleError, ModelError, FleetError, KeyFileError or NetworkError.
        """
        self._log = log if log is not None else LoggingLog(Path(bundle).resolve().name)
        self._files = ServedFiles(
            bundle, fleet, key, rules or Rules(), provider=provider, threads=threads, force=force, log=self._log
        )
        served = self._files.read()
        self._models = served.models
        self._state = state
        if state is not None and forget:
            forget_mix(state, served.models.manifest.device)
        self._metrics = Metrics()
        numbers = itertools.count(secrets.randbits(60))

        self._inbox: deque[Callable[[float], None]] = deque()
        self.ended = threading.Event()
        """Set when the device has stopped serving."""

        membership = served.membership
        address = membership.listen if listen is None else listen
        self._sockets = Sockets(address, membership.keys, dict(membership.allowed), self._metrics, self._log)
        self._address = self._sockets.address
        resolver = Resolver(self._peer_resolved)
        self._peers = Peers(self._hello, self._sockets, numbers, self._metrics, self._log, resolver.look_up)
        try:
            self._peers.set_devices(membership.others)
        except BaseException:
            self._sockets.close()
            raise
        self._service = Service(self._models, self._sockets.reply, self._metrics)
        self._extraction = Extraction(self._sockets.wake)
        self._requests = Requests(self._models, served.rules, self._extraction, self._peers, numbers, self._metrics)
        if state is not None:
            load_mix(state, served.models.manifest, self._requests.mix, self._log)

        self._began = time.monotonic()
        self._looked_at = self._began
        self._saved_at = self._began
        accepted = partial(self._do_if_open, self._serve)
        refused = partial(self._do_if_open, self._refuse_reload)
        self._reloader = Reloader(self._read_again, accepted, refused, self.ended)
        self._leaving_since: float | None = None
        self._busy_s = 0.0
        self.failed = False
        """Whether it has ended because of a bug; False while it serves."""
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, tcp://HOST:PORT; empty when it does not."""
        return self._address

    @property
    def models(self) -> Models:
        """The models it serves at present."""
        return self._models

    def infer(self, inputs: NDArray[Any], deadline_s: float = 1.0) -> Answers:
        """The fleet's answers to these inputs, like Client.infer but without a socket.

        inputs: (rows, …), of the dtype and row shape in the status report's `input`. deadline_s: seconds, over 0 and
        at most 3600. Raises CallError when they are refused, the deadline passes, or the node is closed.
        """
        infer = Infer(0, 0, budget_of(deadline_s), Tensor.pack(inputs, inputs.dtype.name))
        reply: Future[Result | Refuse] = Future()
        self._do(lambda now: self._begin(infer, reply.set_result, now))
        try:
            return answers_of(reply.result(deadline_s + DRAIN_S))
        except TimeoutError:
            raise CallError("the node does not respond") from None

    def status(self) -> StatusReport:
        """What the device reports about itself, its peers and its counters; see `nmoe_edge.status`.

        Raises CallError when the node is closed or does not respond.
        """
        report: Future[StatusReport] = Future()
        self._do(lambda _now: report.set_result(self._status_report()))
        try:
            return report.result(DRAIN_S)
        except TimeoutError:
            raise CallError("the node does not respond") from None

    def reload(self) -> None:
        """Start to read bundle and fleet.toml again, in a thread; return at once.

        When they pass every check the device serves them, and no request fails. Otherwise it keeps the old ones and
        logs `reload_refused`. A device also reloads by itself when the files change.
        """
        self._reloader.request()

    def peer_discovered(self, name: str, address: str) -> None:
        """Say that the peer `name` may be at `address`, tcp://HOST:PORT; tried only if it is not alive elsewhere."""
        self._do_if_open(self._peers.discovered, name, address)

    def leave(self) -> None:
        """Start to shut down: say goodbye, refuse new work, finish what is open. `ended` is set when that is done."""
        if not self.ended.is_set():
            self._do(self._leave)

    def close(self) -> None:
        """Shut down as `leave` does and wait until it is done, normally well under 5 s."""
        self.leave()
        self._thread.join(DRAIN_S + 5)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, task: Callable[[float], None]) -> None:
        """Run a task in the node's thread; it is given the time. CallError when the node is closed."""
        if self.ended.is_set():
            raise CallError("the node is closed")
        self._inbox.append(task)
        self._sockets.wake()

    def _do_if_open(self, task: Callable[..., None], *arguments: object) -> None:
        """Call a function in the node's thread, unless the node is closed."""
        with contextlib.suppress(CallError):
            self._do(lambda _now: task(*arguments))

    def _peer_resolved(self, device: Device, address: str) -> None:
        self._do_if_open(self._peers.resolved, device, address)

    def _run(self) -> None:
        """The node's thread."""
        bugs_in_a_row = 0
        has_drained = False
        try:
            while self._leaving_since is None or not self._is_drained(self._leaving_since):
                try:
                    self._turn()
                    bugs_in_a_row = 0
                except Exception:  # noqa: BLE001  # a bug of ours: log it and go on
                    bugs_in_a_row += 1
                    self._metrics.counts["bugs"] += 1
                    self._log.rarely("bug", traceback.format_exc())
                    if bugs_in_a_row > _MAX_BUGS:
                        return
            has_drained = True
        finally:
            self.failed = not has_drained
            self._shut_down()

    def _shut_down(self) -> None:
        self.ended.set()
        self._leaving_since = self._leaving_since or time.monotonic()
        try:
            while self._inbox:  # their callers wait for a reply
                self._inbox.popleft()(time.monotonic())
        finally:
            self._requests.abandon()
            self._save_mix()
            self._extraction.close()
            self._sockets.close()

    def _turn(self) -> None:
        """Wait for something to happen, then do everything that has become possible."""
        if self._extraction.finished or self._service:
            wait_s = 0.0
        else:
            wake_at = min(self._peers.wake_at, self._requests.wake_at)
            wait_s = min(max(0.0, wake_at - time.monotonic()), _MAX_TURN_S)
        began = self._sockets.wait(wait_s)

        # Messages, then one batch of the expert for peers.
        self._sockets.min_budget_ms = 1000 * self._requests.min_budget_s
        for received in self._sockets.receive():
            self._dispatch(received, time.monotonic())
        before_service = time.monotonic()
        self._service.run()
        now = time.monotonic()
        service_s = now - before_service

        # Tasks of other threads, then requests before and after extraction.
        while self._inbox:
            self._inbox.popleft()(now)
        if self._extraction.has_offers:
            self._extraction.start()
            now = time.monotonic()
        if self._extraction.finished:
            for job in self._extraction.done(_EXTRACTED_PER_TURN):
                self._requests.extraction_done(job, now)

        # Timers.
        if now >= self._peers.wake_at:
            for expert in self._peers.tick(now):
                self._requests.lost(expert, now)
        if now >= self._requests.wake_at:
            self._requests.tick(now)
        if now - self._looked_at > _LOOK_S:
            self._look(now)
        if self._requests.open or self._requests.finished:
            self._measure_cost(time.monotonic() - began - service_s)

    def _measure_cost(self, busy_s: float) -> None:
        """Update what an answered request costs this thread; the cost of refusing others is part of it."""
        self._busy_s += busy_s
        if self._requests.finished >= _MEASURED_REQUESTS or self._busy_s > _MEASURED_S:
            self._requests.cost_s = self._busy_s / max(1, self._requests.finished)
            self._requests.finished = 0
            self._busy_s = 0.0

    def _dispatch(self, received: Received, now: float) -> None:
        """Give one message to the part that handles it."""
        message, request, sender, expert = received
        leaving = self._leaving_since is not None
        if type(message) is Ask and sender is not None and not leaving:  # first, as these are most messages
            self._service.offer(sender, message, now)
        elif sender is None:  # from our connection to a peer
            reply = self._peers.handle_reply(expert, message, request, now)
            if reply is not None:
                self._requests.answered(reply, expert, now)
        elif isinstance(message, Ask | Ping):
            if leaving:
                self._sockets.reply(sender, Refuse(message.request, Reason.SHUTTING_DOWN))
            else:
                self._service.offer(sender, message, now)
        elif isinstance(message, Infer):
            self._begin(message, lambda reply: self._sockets.reply(sender, reply), now)
        elif isinstance(message, Hello):
            welcome = self._peers.handle_hello(message, sender, now) if not leaving else None
            self._sockets.reply(sender, welcome or Refuse(0, Reason.SHUTTING_DOWN))
        elif isinstance(message, Leave):
            left = self._peers.handle_leave(message, sender, now)
            if left is not None:
                self._requests.left(left)
        elif isinstance(message, Status):
            facts = json.dumps(self._status_report(), allow_nan=False)
            self._sockets.reply(sender, Report(message.request, facts))
        elif isinstance(message, Answer | Result | Report | Refuse):
            self._metrics.counts["replies_unrequested"] += 1

    def _begin(self, infer: Infer, reply: Callable[[Result | Refuse], object], now: float) -> None:
        if self._leaving_since is not None:
            reply(Refuse(infer.request, Reason.SHUTTING_DOWN))
        else:
            self._requests.begin(infer, reply, now)

    def _leave(self, now: float) -> None:
        if self._leaving_since is None:
            self._leaving_since = now
            if self.address:
                self._log("leaving", f"{len(self._requests.open)} requests to finish")
            self._peers.say_goodbye(Leave(self._models.manifest.device))

    def _is_drained(self, leaving_since: float) -> bool:
        """Whether a leaving device has finished its work, or has no more time for it."""
        leaving_s = time.monotonic() - leaving_since
        if leaving_s > DRAIN_S:
            return True
        return leaving_s > _GOODBYE_S and not self._requests.open and not self._service

    def _look(self, now: float) -> None:
        """Look after what needs no immediate attention: forgotten requests, changed files, saving."""
        self._looked_at = now
        self._requests.sweep(now)
        if self._files.changed():
            self.reload()
        if now - self._saved_at > _SAVE_S:
            self._saved_at = now
            self._save_mix()
            trim()

    def _save_mix(self) -> None:
        if self._state is not None and self._requests.rules.adapt:
            save_mix(self._state, self._models.manifest, self._requests.mix, self._log)

    def _read_again(self) -> Served:
        """In the reload thread."""
        return self._files.read_again(self._models.manifest.device, self._sockets.has_keys)

    def _refuse_reload(self, why: str) -> None:
        self._metrics.counts["reloads_refused"] += 1
        self._log("reload_refused", f"keeps the old bundle: {why}")

    def _serve(self, served: Served) -> None:
        manifest = served.models.manifest
        self._models = self._service.models = served.models
        self._requests.serve(served.models, served.rules)
        self._sockets.allow(dict(served.membership.allowed))
        self._peers.set_devices(served.membership.others)
        self._metrics.counts["reloads"] += 1
        self._log("reload", f"serves {manifest.digest[:12]} now", bundle=manifest.digest)

    def _hello(self) -> Hello:
        manifest = self._models.manifest
        return Hello(manifest.device, manifest.expert, manifest.trunk_bytes, (), bundle=manifest.digest)

    def _status_report(self) -> StatusReport:
        uptime_s = time.monotonic() - self._began
        return status_report(
            self._models, self._requests, self._peers, self._sockets, self._metrics, self._files.threads, uptime_s
        )
