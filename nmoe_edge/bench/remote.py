"""The part of the benchmark over the wire: a peer's expert, and the fleet through the device of the bundle.

The device of the bundle is served by the benchmark unless it serves already. load.py sends the requests.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import IO, Any, Literal

from nmoe_edge.bench.board import Meter
from nmoe_edge.bench.load import (
    Drive,
    MakeRequest,
    drive,
    greet,
    make_asks,
    make_infers,
    message_bytes,
    poisson,
    warm_up,
)
from nmoe_edge.bench.plan import SOURCE_ROOT, Plan, Say
from nmoe_edge.bench.probe import BATCHES
from nmoe_edge.bench.record import Row, Tally
from nmoe_edge.bundle.fleet import Device, read_fleet
from nmoe_edge.bundle.folder import Bundle
from nmoe_edge.client import Client, Connection
from nmoe_edge.common.text import counted
from nmoe_edge.errors import BenchError, CallError
from nmoe_edge.keys import address_of, keys_to
from nmoe_edge.status import PeerReport, StatusReport

_READY_S = 60.0
"""Longest wait until a device that the benchmark started answers."""
_MEET_S = 3.0
"""Longest wait until the device has met all its peers."""
_LEAVE_S = 10.0
"""Longest wait until a device that the benchmark started has ended."""


@dataclass(slots=True)
class Series:
    """A kind of request that is measured round after round; it becomes one row of the record."""

    scenario: Literal["peer", "fleet"]
    what: str
    setting: str
    rows: int
    connection: Connection
    request: MakeRequest
    clients: int = 1
    rate: float | None = None
    """Requests per second of an open loop; None for a closed loop."""
    own: int = -1
    """Number of the asked device's own expert, to count rows answered locally."""
    drives: list[Drive] = field(default_factory=list)
    """One for each complete round."""
    watts: list[float | None] = field(default_factory=list)
    settled: bool = True

    @property
    def title(self) -> str:
        """What is measured, for a line of progress."""
        return f"{self.what}, {self.setting}, {counted(self.rows, 'row')} per message"

    def measure(self, numbers: Iterator[int], seconds: float) -> None:
        """Measure one round. numbers: fresh request numbers; BenchError if no request is answered."""
        self.settled &= warm_up(self.connection, self.request, numbers, self.clients)
        meter = Meter(time.monotonic_ns())
        arrivals = None if self.rate is None else poisson(self.rate, seed=len(self.drives))
        clients = self.clients if arrivals is None else 0
        found = drive(
            self.connection,
            self.request,
            numbers,
            seconds,
            clients=clients,
            arrivals=arrivals,
            own=self.own,
            meter=meter,
        )
        if not found.took_ns:
            raise BenchError(
                f"{self.what}, {self.setting}: none of {found.asked} requests in {seconds:.3g} s was answered,"
                f" {found.refused} were refused; use another --rate or a longer --duration. {found.refusal}"
            )
        self.drives.append(found)
        self.watts.append(meter.mean_w)

    def row(self) -> Row:
        """The samples and counts of all rounds."""
        answer = next(found.answer for found in self.drives if found.answer is not None)
        return Row(
            self.scenario,
            self.what,
            self.setting,
            self.rows,
            tuple(tuple(found.took_ns) for found in self.drives),
            self.settled,
            mean_power(self.watts),
            message_bytes(self.request(0)) / self.rows,
            message_bytes(answer) / self.rows,
            self._tally(),
        )

    def _tally(self) -> Tally:
        return Tally(
            asked=sum(found.asked for found in self.drives),
            refused=sum(found.refused for found in self.drives),
            unanswered=sum(found.unanswered for found in self.drives),
            unsent=sum(found.unsent for found in self.drives),
            rows=sum(found.rows for found in self.drives),
            at_home=sum(found.local_rows for found in self.drives),
            degraded=sum(found.degraded for found in self.drives),
        )


def mean_power(watts: list[float | None]) -> float | None:
    """Mean of the rounds' power; None if a round lacks it."""
    known = [watt for watt in watts if watt is not None]
    return mean(known) if len(known) == len(watts) else None


def peer_series(plan: Plan, bundle: Bundle, target: str, stack: contextlib.ExitStack) -> Iterator[Series]:
    """Asks of a peer's expert, for each type of latents. target: the peer's address or name; BenchError if it refuses.

    stack: closes the connection.
    """
    manifest = bundle.manifest
    connection = Connection(address_of(target, plan.fleet), *keys_to(target, plan.fleet, plan.key, manifest.device))
    stack.callback(connection.close)
    welcome = greet(connection, manifest)
    for dtype in plan.latents:
        for rows in BATCHES:
            request = make_asks(bundle.selftest.latents, dtype, rows, welcome.expert, manifest.trunk_bytes)
            yield Series("peer", f"ask of expert {welcome.expert}", dtype, rows, connection, request)


@dataclass(frozen=True, slots=True)
class ServedDevice:
    """The device of the bundle, which serves and has met its peers."""

    client: Client
    access: tuple[Any, ...]
    """The key pair to ask with and the device's public key, as Connection takes them."""
    setting: str
    peers: int
    alive: int
    """Peers that were alive when the benchmark began."""


@contextlib.contextmanager
def served_device(plan: Plan, bundle: Bundle, fleet: Path, say: Say) -> Iterator[ServedDevice]:
    """The device of the bundle, served until the context ends unless it serves already.

    BenchError if it serves another bundle, or if none of its peers is alive.
    """
    manifest = bundle.manifest
    device = read_fleet(fleet).named(manifest.device)
    access = keys_to(device.address, fleet, plan.key, device.name)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(device.address, *access))
        if _status(client) is None:
            say(f"no device answers at {device.address}: serving {device.name} for this benchmark")
            stack.enter_context(_serving(plan, fleet, device, client))
        facts = _status_with_peers(client)
        if facts.get("bundle") != manifest.digest:
            raise BenchError(
                f"the device at {device.address} serves another bundle than {plan.bundle};"
                " stop it, or measure the bundle that it serves"
            )
        peers = len(_peers(facts))
        alive = alive_peers(facts)
        if peers and not alive:
            raise BenchError(
                f"{device.name} reaches none of the {peers} peers in {fleet}: serve them too, or leave out --fleet"
            )
        say(f"{device.name} reaches {alive} of its {peers} peers")
        # The number of threads comes from the device: if it served already, it may not be the plan's.
        setting = f"{device.name}, {counted(facts['threads'], 'thread')}"
        yield ServedDevice(client, access, setting, peers, alive)


def fleet_series(plan: Plan, bundle: Bundle, device: ServedDevice, stack: contextlib.ExitStack) -> Iterator[Series]:
    """Requests through the fleet: a closed loop, and with --rate an open loop. stack: closes the connections."""
    manifest = bundle.manifest
    request = make_infers(bundle.selftest.inputs)

    def series(what: str, clients: int, rate: float | None) -> Series:
        connection = Connection(device.client.address, *device.access, connections=clients)
        stack.callback(connection.close)
        return Series("fleet", what, device.setting, 1, connection, request, clients, rate, manifest.expert)

    yield series(f"closed loop, {counted(plan.clients, 'client')}", plan.clients, None)
    if plan.rate is not None:
        yield series(f"open loop, {plan.rate:g}/s", 1, plan.rate)


def alive_peers(facts: StatusReport) -> int:
    """Number of alive peers in a device's status."""
    return sum(peer["state"] == "alive" for peer in _peers(facts))


def _peers(facts: StatusReport) -> list[PeerReport]:
    """The peers in a status; empty if whatever answers at the address reports none."""
    return facts.get("peers") or []


def _status(client: Client) -> StatusReport | None:
    with contextlib.suppress(CallError):  # no device answers
        return client.status(1.0)
    return None


def _status_with_peers(client: Client) -> StatusReport:
    """The status of a device once it has met its peers, or after the time to meet them."""
    until = time.monotonic() + _MEET_S
    while True:
        facts = client.status()
        if alive_peers(facts) == len(_peers(facts)) or time.monotonic() > until:
            return facts
        time.sleep(0.1)


@contextlib.contextmanager
def _serving(plan: Plan, fleet: Path, device: Device, client: Client) -> Iterator[None]:
    """Run `nmoe-edge serve` in its own process; what the device learns is deleted afterwards."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise BenchError(f"no temporary folder: {error.strerror}; set TMPDIR to a writable folder") from error
    with folder as state, (Path(state) / "log").open("w+") as log:
        # In its own session: the terminal must not send it SIGHUP, a reload, nor Ctrl-C, which would end it first.
        process = subprocess.Popen(  # noqa: S603  # our own command
            _serve_command(plan, fleet, state), stdout=log, stderr=log, cwd=SOURCE_ROOT, start_new_session=True
        )
        try:
            _wait_until_ready(process, device, client, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _serve_command(plan: Plan, fleet: Path, state: str) -> list[str]:
    """The command line that serves the plan's bundle; it runs in another folder, so its paths are absolute."""
    command = [sys.executable, "-m", "nmoe_edge", "serve", str(plan.bundle.absolute())]
    command += ["--fleet", str(fleet.absolute()), "--state", state]
    command += ["--threads", str(plan.threads[0]), "--provider", plan.provider]
    if plan.key is not None:
        command += ["--key", str(plan.key.absolute())]
    return command


def _wait_until_ready(process: subprocess.Popen[bytes], device: Device, client: Client, log: IO[str]) -> None:
    """Return when the device answers; BenchError with the last line of its log if it ends or takes too long."""
    until = time.monotonic() + _READY_S
    while _status(client) is None:
        if process.poll() is not None or time.monotonic() > until:
            log.seek(0)
            lines = log.read().strip().splitlines() or ["it printed nothing"]
            raise BenchError(f"{device.name} cannot be served: {lines[-1].removeprefix('nmoe-edge: ')}")
