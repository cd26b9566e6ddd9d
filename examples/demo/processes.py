"""What the demo asks of a fleet: processes that are ended whatever happens, applications, and what became of each row.

Knows nothing of training and of pages; examples/demo is the flow.
"""

from __future__ import annotations

import itertools
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.client import Client
from nmoe_edge.errors import CallError
from nmoe_edge.keys import keys_to

DEADLINE_S = 0.25
"""Of a row; its application waits a little longer and then turns to a neighbour."""
LAST_S = 2.0
"""The same once nobody has answered in time: then it is the machine that is busy."""
LOOK_S = 0.2
"""Between two looks whether a device that did not answer is back."""
PATIENCE_S = 30.0
"""For what comes by itself, on a machine that does other work too."""
TOGETHER = 32
"""Rows in a message where latency is not looked at."""
END_S = 10.0


class DemoError(Exception):
    """What the demo cannot go on from, or what did not hold: one line."""


class Processes:
    """Everything that was started, by its own pid; ended when the block is left, also by Ctrl-C and SIGTERM."""

    def __init__(self, logs: Path) -> None:
        """logs: a folder for what devices say"""
        self._logs = logs
        self._all: list[subprocess.Popen[str]] = []
        self._devices: dict[str, subprocess.Popen[str]] = {}
        self._held, self._wanted = 0, 0

    def run(self, *command: str) -> None:
        """Run a command of ours to its end, which must be well."""
        process = self._start(command)
        if process.wait():
            raise DemoError(f"{command[0]} {command[1]} ended with exit {process.returncode}; the line above says why")

    def serve(self, name: str, *command: str) -> None:
        """Let a device of this name begin to serve."""
        with (self._logs / f"{name}.log").open("a") as log:
            self._devices[name] = self._start(command, stdout=subprocess.PIPE, stderr=log)

    def ready(self, name: str) -> None:
        """Wait until it says so."""
        said = self._devices[name].stdout
        if said is None or not said.readline().startswith("ready: "):
            log = self._logs / f"{name}.log"
            raise DemoError(f"{name} does not serve: {(log.read_text().splitlines() or ['it said nothing'])[-1]}")

    def kill(self, name: str) -> None:
        """Without a word."""
        self._devices[name].send_signal(signal.SIGKILL)
        self._devices[name].wait()

    def died(self) -> list[str]:
        """The devices that do not serve."""
        return [name for name, process in self._devices.items() if process.poll() is not None]

    def memory_mib(self) -> dict[str, dict[str, float]]:
        """Of each that serves: what is resident, and its share of that when pages that many have are shared out."""
        found = {}
        for name, process in self._devices.items():
            if process.poll() is not None:
                continue
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kb = {line.split()[0]: int(line.split()[1]) for line in lines}
            found[name] = {"rss": kb["Rss:"] / 1024, "pss": kb["Pss:"] / 1024}
        return found

    def leave(self) -> list[str]:
        """End the devices as one ends them; those that did not end well."""
        for process in self._devices.values():
            process.terminate()
        return [name for name, process in self._devices.items() if _ended(process) != 0]

    def __enter__(self) -> Processes:
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(which, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._held += 1  # a second Ctrl-C leaves nothing behind either
        if self._wanted:
            print(f"stopped by {signal.Signals(self._wanted).name}; ending what was started", file=sys.stderr)
        for process in self._all:
            process.terminate()
        for process in self._all:
            _ended(process)
            if process.stdout is not None:
                process.stdout.close()

    def _start(self, command: tuple[str, ...], **streams: object) -> subprocess.Popen[str]:
        """A process that does not get the terminal's Ctrl-C: it is ended from here."""
        program = Path(sys.executable).with_name(command[0])
        with self._postponed():
            process = subprocess.Popen(  # noqa: S603  # our own commands, no shell
                [str(program), *command[1:]], text=True, start_new_session=True, **streams
            )
            self._all.append(process)
        return process

    @contextmanager
    def _postponed(self) -> Iterator[None]:
        """A signal that came between a start and its entry in the list would leave a process behind."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._wanted:
            self._stop(self._wanted, None)

    def _stop(self, which: int, _: object) -> None:
        self._wanted = which
        if not self._held:
            raise SystemExit(128 + which)


def _ended(process: subprocess.Popen[str]) -> int:
    """Its exit status, waited for, and hurried when it takes too long."""
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def on_free_ports(folder: Path) -> None:
    """Give each device of a fleet a port that is free on this machine; one edits fleet.toml for that."""
    path = folder / FLEET_FILE
    fleet = read_fleet(path)
    with ExitStack() as held:  # all at once, so that no two are the same
        sockets = [held.enter_context(socket.socket()) for _ in fleet.device]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    devices = (replace(d, address=f"tcp://127.0.0.1:{p}") for d, p in zip(fleet.device, ports, strict=True))
    write_fleet(path, replace(fleet, device=tuple(devices)))


@contextmanager
def clients(folder: Path) -> Iterator[dict[str, Client]]:
    """A client of each device, with that device's own key: an application beside it has that."""
    path = folder / FLEET_FILE
    with ExitStack() as stack:
        found = {}
        for device in read_fleet(path).device:
            found[device.name] = stack.enter_context(Client(device.address, *keys_to(device.name, path, None)))
        yield found


def wait_until_seen(asked: dict[str, Client], name: str, alive: bool) -> None:
    """Wait until all that are asked see a peer alive, or all see it gone."""
    end = time.monotonic() + PATIENCE_S
    for who, client in asked.items():
        why = f"{name} is not seen {'alive' if alive else 'gone'} by {who} after {PATIENCE_S:.0f} s"
        while True:
            try:
                if {peer["name"]: peer["state"] == "alive" for peer in client.status()["peers"]}[name] == alive:
                    break
            except CallError as error:
                why = f"{who} does not say whether it sees {name}: {error}"
            if time.monotonic() > end:
                raise DemoError(why)
            time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Tests:
    """The rows that are asked."""

    own: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]
    """For each device, rows and labels distributed as its client's."""
    balanced: tuple[NDArray[np.uint8], NDArray[np.int64]]
    """The same for all."""

    def of(self, part: str, device: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Rows and labels of a device: "own" or "iid"."""
        return self.own[device] if part == "own" else self.balanced


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a row."""

    device: int
    """Whose application asked."""
    part: str
    """own or iid: which test set it is of."""
    due_s: float
    """When it was due, from the beginning on."""
    latency_s: float
    """From then on: waiting behind others, for a device that is dead and for a second one is all in it."""
    by: int | None = None
    """The device that gave the answer; None: nobody."""
    experts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    degraded: bool = False
    right: bool = False

    @property
    def answered_s(self) -> float:
        """When it was over, from the beginning on."""
        return self.due_s + self.latency_s

    @property
    def way(self) -> str:
        """How it came to its answer, in a word."""
        if self.by is None or not self.experts:
            return "unanswered"
        if self.degraded:
            return "degraded"
        if self.by != self.device:
            return "neighbour"
        return "home" if self.experts == (self.device,) else "peers"


def ask_everything(asked: list[Client], tests: Tests) -> list[Row]:
    """Every test row, own and balanced, of its device, many in a message: what the fleet answers, and who does."""

    def application(device: int) -> list[Row]:
        rows: list[Row] = []
        for part in ("own", "iid"):
            x, y = tests.of(part, device)
            for start in range(0, len(x), TOGETHER):
                answers = asked[device].infer(x[start : start + TOGETHER], PATIENCE_S)
                said = zip(answers.rows, answers.outputs.argmax(1) == y[start : start + TOGETHER], strict=True)
                rows += [
                    Row(device, part, 0.0, answers.elapsed_s, device, r.experts, r.weights, r.degraded, bool(right))
                    for r, right in said
                ]
        return rows

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(itertools.chain(*pool.map(application, range(len(asked)))))


class Traffic:
    """An application beside each device, that has a row every 1/rate seconds, own and balanced by turns.

    Rows are due when they are due: what waits behind a slow one is late. When its device does not answer, an
    application asks the next one round the ring, and goes home when somebody has seen the device answer again.
    """

    def __init__(self, asked: list[Client], tests: Tests, rate: float) -> None:
        """Goes on while the block is entered; rate: rows a second and device."""
        self.rows: list[Row] = []
        self.began = 0.0
        self._asked, self._tests, self._rate = asked, tests, rate
        self._away: set[int] = set()
        self._end = math.inf
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(len(asked) + 1)
        self._jobs: list[Future[None]] = []

    @property
    def now_s(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def until(self, moment_s: float) -> None:
        """Let it go on."""
        while (left := moment_s - self.now_s) > 0:
            time.sleep(min(left, 0.1))
            for job in self._jobs:
                if job.done():
                    job.result()

    def __enter__(self) -> Traffic:
        self.began = time.monotonic()
        self._jobs = [self._pool.submit(self._application, device) for device in range(len(self._asked))]
        self._jobs.append(self._pool.submit(self._look))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end = time.monotonic()
        self._over.set()
        self._pool.shutdown()
        if kind is None:
            for job in self._jobs:
                job.result()

    def _application(self, device: int) -> None:
        for number in itertools.count():
            due = self.began + (number + device / len(self._asked)) / self._rate
            self._over.wait(max(0.0, due - time.monotonic()))
            if due > self._end:  # what was due before is answered, however late it is
                return
            part = ("own", "iid")[number % 2]
            x, y = self._tests.of(part, device)
            at = (number // 2 + device * len(x) // len(self._asked)) % len(x)
            self.rows.append(self._asked_for(device, part, due, x[at : at + 1], int(y[at])))

    def _asked_for(self, device: int, part: str, due: float, x: NDArray[np.uint8], y: int) -> Row:
        ring = [(device + step) % len(self._asked) for step in range(len(self._asked))]
        near = [(place, DEADLINE_S) for place in ring if place not in self._away]
        for place, deadline_s in [*near, *((place, LAST_S) for place in ring)]:
            try:
                answers = self._asked[place].infer(x, deadline_s)
            except CallError:
                self._away.add(place)
                continue
            took, (row,) = time.monotonic() - due, answers.rows
            right = int(answers.outputs[0].argmax()) == y
            return Row(device, part, due - self.began, took, place, row.experts, row.weights, row.degraded, right)
        return Row(device, part, due - self.began, time.monotonic() - due)

    def _look(self) -> None:
        """Whether those that did not answer do."""
        while not self._over.wait(LOOK_S):
            for place in list(self._away):
                try:
                    self._asked[place].status(LOOK_S)
                except CallError:
                    continue
                self._away.discard(place)
