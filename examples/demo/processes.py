"""The running part of the demo: processes that always end, clients, and what happened to each row.

Knows nothing of training and pages; __main__.py is the sequence of steps.
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
"""Deadline of a row. The client waits a little longer and then asks the next device."""
LAST_DEADLINE_S = 2.0
"""Deadline in a second round, once no device has answered in time: then the machine is busy."""
LOOK_S = 0.2
"""Interval between checks whether a device that did not answer is back."""
PATIENCE_S = 30.0
"""Longest wait for something that must happen, on a machine that does other work too."""
BATCH = 32
"""Rows in a message where latency is not measured."""
END_S = 10.0
"""Longest wait for a process to end after SIGTERM."""


class DemoError(Exception):
    """The demo cannot continue, or one of its checks failed. The message is one line."""


class Processes:
    """All processes of the demo. They end when the block is left, also after Ctrl-C and SIGTERM."""

    def __init__(self, logs: Path) -> None:
        """logs: the folder for the log of each device"""
        self._logs = logs
        self._all: list[subprocess.Popen[str]] = []
        self._devices: dict[str, subprocess.Popen[str]] = {}
        self._signals_held = 0
        self._signal_received = 0

    def run(self, *command: str) -> None:
        """Run a command to its end. Raise DemoError where it fails."""
        process = self._start(command)
        if process.wait():
            name = f"{command[0]} {command[1]}"
            raise DemoError(f"{name} ended with exit {process.returncode}; the line above says why")

    def serve(self, name: str, *command: str) -> None:
        """Start a device; `ready` waits for it."""
        with (self._logs / f"{name}.log").open("a") as log:
            self._devices[name] = self._start(command, stdout=subprocess.PIPE, stderr=log)

    def ready(self, name: str) -> None:
        """Wait until the device prints that it is ready."""
        output = self._devices[name].stdout
        if output is None or not output.readline().startswith("ready: "):
            lines = (self._logs / f"{name}.log").read_text().splitlines()
            raise DemoError(f"{name} does not serve: {lines[-1] if lines else 'its log is empty'}")

    def kill(self, name: str) -> None:
        """End a device with SIGKILL, so that it cannot say goodbye to its peers."""
        self._devices[name].send_signal(signal.SIGKILL)
        self._devices[name].wait()

    def died(self) -> list[str]:
        """The devices that do not run."""
        return [name for name, process in self._devices.items() if process.poll() is not None]

    def memory_mib(self) -> dict[str, dict[str, float]]:
        """Memory of each running device: all resident pages (rss), and with shared pages divided fairly (pss)."""
        found = {}
        for name, process in self._devices.items():
            if process.poll() is not None:
                continue
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kib = {line.split()[0]: int(line.split()[1]) for line in lines}
            found[name] = {"rss": kib["Rss:"] / 1024, "pss": kib["Pss:"] / 1024}
        return found

    def stop(self) -> list[str]:
        """End all devices with SIGTERM. The names of those that failed to end cleanly."""
        for process in self._devices.values():
            process.terminate()
        return [name for name, process in self._devices.items() if _wait_or_kill(process) != 0]

    def __enter__(self) -> Processes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._signals_held += 1  # a second Ctrl-C does not interrupt the clean-up
        if self._signal_received:
            name = signal.Signals(self._signal_received).name
            print(f"stopped by {name}; ending all processes of the demo", file=sys.stderr)
        for process in self._all:
            process.terminate()
        for process in self._all:
            _wait_or_kill(process)
            if process.stdout is not None:
                process.stdout.close()

    def _start(self, command: tuple[str, ...], **streams: object) -> subprocess.Popen[str]:
        """Start a process outside the terminal's process group, so that Ctrl-C reaches only the demo."""
        program = Path(sys.executable).with_name(command[0])
        with self._hold_signals():
            process = subprocess.Popen(  # noqa: S603  # our own commands, no shell
                [str(program), *command[1:]], text=True, start_new_session=True, **streams
            )
            self._all.append(process)
        return process

    @contextmanager
    def _hold_signals(self) -> Iterator[None]:
        """Delay signals: one between the start of a process and its entry in the list would leave it running."""
        self._signals_held += 1
        try:
            yield
        finally:
            self._signals_held -= 1
        if self._signal_received:
            self._on_signal(self._signal_received, None)

    def _on_signal(self, number: int, _: object) -> None:
        self._signal_received = number
        if not self._signals_held:
            raise SystemExit(128 + number)


def _wait_or_kill(process: subprocess.Popen[str]) -> int:
    """The exit status. A process that takes longer than END_S is killed."""
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def on_free_ports(folder: Path) -> None:
    """Give each device in fleet.toml a port that is free on this machine. On real devices you edit the file."""
    path = folder / FLEET_FILE
    fleet = read_fleet(path)
    with ExitStack() as held:  # all ports stay open until the last is found, so no two are equal
        sockets = [held.enter_context(socket.socket()) for _ in fleet.device]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    devices = [
        replace(device, address=f"tcp://127.0.0.1:{port}") for device, port in zip(fleet.device, ports, strict=True)
    ]
    write_fleet(path, replace(fleet, device=tuple(devices)))


@contextmanager
def clients(folder: Path) -> Iterator[dict[str, Client]]:
    """A client for each device. It uses the key of that device, as a program on the same machine would."""
    path = folder / FLEET_FILE
    with ExitStack() as stack:
        found = {}
        for device in read_fleet(path).device:
            keys = keys_to(device.name, path, None)
            found[device.name] = stack.enter_context(Client(device.address, *keys))
        yield found


def wait_until_seen(observers: dict[str, Client], name: str, alive: bool) -> None:
    """Wait until all observers report the device `name` as alive, or all report it as gone."""
    end = time.monotonic() + PATIENCE_S
    state = "alive" if alive else "gone"
    for observer, client in observers.items():
        why = f"{observer} does not report {name} as {state} after {PATIENCE_S:.0f} s"
        while True:
            try:
                peers = {peer["name"]: peer["state"] for peer in client.status()["peers"]}
                if (peers[name] == "alive") == alive:
                    break
            except CallError as error:
                why = f"{observer} does not report the state of {name}: {error}"
            if time.monotonic() > end:
                raise DemoError(why)
            time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Tests:
    """The rows to ask, with their labels."""

    own: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]
    """For each device, rows with the class mix of its training samples."""
    balanced: tuple[NDArray[np.uint8], NDArray[np.int64]]
    """Rows with all classes, the same for every device."""

    def of(self, part: str, device: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Rows and labels for a device; part: "own" or "iid"."""
        return self.own[device] if part == "own" else self.balanced


@dataclass(frozen=True, slots=True)
class Row:
    """What happened to one row. Times are in seconds since the traffic began."""

    device: int
    """The device that the client belongs to."""
    part: str
    """The test set: own or iid."""
    scheduled_s: float
    latency_s: float
    """From the scheduled time to the answer. Includes waiting for earlier rows, dead devices and second attempts."""
    by: int | None = None
    """The device that replied to the client; None where none did."""
    experts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    degraded: bool = False
    right: bool = False

    @property
    def answered_s(self) -> float:
        return self.scheduled_s + self.latency_s

    @property
    def way(self) -> str:
        """How the row got its answer, as measurements.json names it.

        home        by the device's own expert
        peers       with the expert of a peer
        degraded    without the expert that the gate chose
        neighbour   through another device, because the client's own device did not reply
        unanswered
        """
        if self.by is None or not self.experts:
            return "unanswered"
        if self.degraded:
            return "degraded"
        if self.by != self.device:
            return "neighbour"
        return "home" if self.experts == (self.device,) else "peers"


def ask_everything(fleet: list[Client], tests: Tests) -> list[Row]:
    """Ask every device all its test rows, own and balanced, in large messages. For accuracy, not for latency."""

    def ask(device: int) -> list[Row]:
        found: list[Row] = []
        for part in ("own", "iid"):
            x, y = tests.of(part, device)
            for start in range(0, len(x), BATCH):
                batch = slice(start, start + BATCH)
                answers = fleet[device].infer(x[batch], PATIENCE_S)
                right = answers.outputs.argmax(1) == y[batch]
                for row, correct in zip(answers.rows, right, strict=True):
                    facts = (row.experts, row.weights, row.degraded, bool(correct))
                    found.append(Row(device, part, 0.0, answers.elapsed_s, device, *facts))
        return found

    with ThreadPoolExecutor(len(fleet)) as pool:
        return list(itertools.chain(*pool.map(ask, range(len(fleet)))))


class Traffic:
    """A client for each device that sends one row every 1/rate seconds, from the own and the balanced test in turn.

    The schedule is fixed: a row that waits behind a slow one is late. When its device does not answer, a client asks
    the next device. It returns to its own device when that answers status requests again.
    """

    def __init__(self, fleet: list[Client], tests: Tests, rate: float) -> None:
        """Traffic flows while the block is entered.

        fleet: a client for each device
        rate: rows per second and device
        """
        self.rows: list[Row] = []
        self.began = 0.0
        self._fleet = fleet
        self._tests = tests
        self._rate = rate
        self._silent: set[int] = set()
        """Devices that did not answer."""
        self._end = math.inf
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(len(fleet) + 1)
        self._jobs: list[Future[None]] = []

    @property
    def now_s(self) -> float:
        """Seconds since the traffic began."""
        return time.monotonic() - self.began

    def until(self, moment_s: float) -> None:
        """Let the traffic flow until `moment_s`. Raises what a client raised."""
        while (left := moment_s - self.now_s) > 0:
            time.sleep(min(left, 0.1))
            for job in self._jobs:
                if job.done():
                    job.result()

    def __enter__(self) -> Traffic:
        self.began = time.monotonic()
        self._jobs = [self._pool.submit(self._send_rows, device) for device in range(len(self._fleet))]
        self._jobs.append(self._pool.submit(self._look_for_silent))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end = time.monotonic()
        self._over.set()
        self._pool.shutdown()
        if kind is None:
            for job in self._jobs:
                job.result()

    def _send_rows(self, device: int) -> None:
        """The client of one device."""
        for number in itertools.count():
            # Clients take turns, so that their rows are spread evenly.
            scheduled = self.began + (number + device / len(self._fleet)) / self._rate
            self._over.wait(max(0.0, scheduled - time.monotonic()))
            if scheduled > self._end:  # earlier rows are still answered, however late
                return
            part = ("own", "iid")[number % 2]
            x, y = self._tests.of(part, device)
            at = (number // 2 + device * len(x) // len(self._fleet)) % len(x)
            self.rows.append(self._send(device, part, scheduled, x[at : at + 1], int(y[at])))

    def _send(self, device: int, part: str, scheduled: float, x: NDArray[np.uint8], y: int) -> Row:
        """Ask devices in turn until one answers, the client's own first and those known to be silent last."""
        ring = [(device + step) % len(self._fleet) for step in range(len(self._fleet))]
        first = [(place, DEADLINE_S) for place in ring if place not in self._silent]
        second = [(place, LAST_DEADLINE_S) for place in ring]
        scheduled_s = scheduled - self.began
        for place, deadline_s in first + second:
            try:
                answers = self._fleet[place].infer(x, deadline_s)
            except CallError:
                self._silent.add(place)
                continue
            latency_s = time.monotonic() - scheduled
            (row,) = answers.rows
            right = int(answers.outputs[0].argmax()) == y
            return Row(device, part, scheduled_s, latency_s, place, row.experts, row.weights, row.degraded, right)
        return Row(device, part, scheduled_s, time.monotonic() - scheduled)

    def _look_for_silent(self) -> None:
        """Ask silent devices for their status until they answer."""
        while not self._over.wait(LOOK_S):
            for place in list(self._silent):
                try:
                    self._fleet[place].status(LOOK_S)
                except CallError:
                    continue
                self._silent.discard(place)
