"""Fleets that really serve, for tests: the tiny fleet on free ports, in this process or in processes of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import zmq

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.client import Client
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device.node import Node
from nmoe_edge.device.rules import Rules
from nmoe_edge.errors import CallError
from nmoe_edge.keys import key_path, keys_folder, read_key, with_keys
from nmoe_edge.protocol.messages import Answer, Ask, Hello, Infer, Ping, Pong, Status, Welcome
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import decode, encode

NAMES = ("attic", "barn", "cellar")
NO_HEDGES = Rules(hedge=False)


def free_ports(count):
    """Ports that nobody has: each was taken for a moment."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def settled(source, folder, keyed=False):
    """A copy of a fleet's folder with addresses of its own, and with keys."""
    shutil.copytree(source, folder)
    fleet = read_fleet(folder / FLEET_FILE)
    ports = free_ports(len(fleet.device))
    devices = [replace(d, address=f"tcp://127.0.0.1:{p}") for d, p in zip(fleet.device, ports, strict=True)]
    fleet = replace(fleet, device=tuple(devices))
    if keyed:
        fleet = with_keys(fleet, [d.name for d in devices], keys_folder(folder / FLEET_FILE))
    write_fleet(folder / FLEET_FILE, fleet)
    return folder


def pinned(folder, bundle):
    """Let fleet.toml name this bundle."""
    fleet = read_fleet(folder / FLEET_FILE)
    manifest = bundle.manifest
    devices = (replace(d, bundle=manifest.digest) if d.name == manifest.device else d for d in fleet.device)
    write_fleet(folder / FLEET_FILE, replace(fleet, device=tuple(devices)))


def bright(*thirds):
    """An image for each: bright in that third, so that the gate wants that expert."""
    images = np.full((len(thirds), 1, 6, 6), 10, np.uint8)
    for image, third in zip(images, thirds, strict=True):
        image[0, 2 * third : 2 * third + 2] = 200
    return images


def until(holds, seconds=10.0):
    """Wait for something that comes by itself; say so when it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def states(facts):
    """Peer -> state, of a status."""
    return {peer["name"]: peer["state"] for peer in facts["peers"]}


def address_of(folder, name):
    """Of a device of the fleet."""
    return read_fleet(folder / FLEET_FILE).named(name).address


def answered_by(device, image):
    """Who answers it; nobody while what was given up is still in the device's queue."""
    with contextlib.suppress(CallError):
        return device.infer(image).rows[0].experts


def answering(ask, number=0, expert=2, shape=None):
    """An Answer as frames; by default the right one."""
    outputs = np.ones(shape or (ask.latents.rows, 3), np.float32)
    return encode(Answer(ask.request + number, expert, 1, Tensor.pack(outputs, "float32")))


def sound_frames(manifest):
    """A message of every kind that a device takes from others, as frames."""
    trunk = manifest.trunk_bytes
    return [
        encode(Ask(5, 0, 1000, manifest.expert, trunk, Tensor.pack(np.ones((2, 4), "f4"), "float32"))),
        encode(Infer(6, 0, 1000, Tensor.pack(bright(0, 1), "uint8"))),
        encode(Ping(7)),
        encode(Hello("barn", 1, trunk)),
        encode(Status(8)),
    ]


def mangled(rng, sound, least=0):
    """One of these with a few bytes changed, or now and then frames of nothing but noise."""
    if rng.random() < 0.2:
        return [bytes(rng.bytes(rng.integers(0, 300))) for _ in range(rng.integers(1, 6))]
    frames = [bytearray(frame) for frame in sound[rng.integers(len(sound))]]
    for _ in range(rng.integers(least, 4)):
        frame = frames[rng.integers(len(frames))]
        if len(frame):
            frame[rng.integers(len(frame))] = rng.integers(256)
    return frames


@contextlib.contextmanager
def nodes(folder, *names, rules=NO_HEDGES, **options):
    """Devices of a fleet in this process, that know each other."""
    with contextlib.ExitStack() as running:
        made = []
        for name in names or NAMES:
            node = Node(folder / name, folder / FLEET_FILE, rules=rules, log=StderrLog(name), **options)
            running.callback(node.close)
            made.append(node)
        for node in made:
            others = {other.models.manifest.device for other in made if other is not node}
            until(lambda node=node, others=others: all(states(node.status())[other] == "alive" for other in others))
        yield made


def serve_command(folder, name, *options):
    """What is typed to serve a device."""
    state = str(folder.parent / "state")
    return [sys.executable, "-m", "nmoe_edge", "serve", str(folder / name), "--state", state, *options]


class Processes:
    """Devices of a fleet in processes of their own, ended by their pid."""

    def __init__(self, folder, *names, options=()):
        self.folder, self.options, self.running = folder, options, {}
        self.logs = folder.parent / "logs"
        self.logs.mkdir(exist_ok=True)
        try:
            for name in names or NAMES:
                self.start(name)
            for name in self.running:
                self.ready(name)
        except BaseException:
            self.end()
            raise

    def command(self, name):
        """What is typed to serve it."""
        return serve_command(self.folder, name, *self.options)

    def start(self, name):
        """One more, or the same again."""
        root = str(Path(__file__).parents[2])
        with (self.logs / name).open("a") as log:
            self.running[name] = subprocess.Popen(
                self.command(name),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": root},
            )

    def ready(self, name):
        """Its ready line."""
        line = self.running[name].stdout.readline()
        assert line.startswith("ready: "), (self.logs / name).read_text()
        return line

    def signal(self, name, which):
        """Send it a signal."""
        os.kill(self.running[name].pid, which)

    def kill(self, name):
        """Without a word."""
        self.running[name].kill()
        self.running[name].wait()
        self.running[name].stdout.close()

    def client(self, name):
        """A client of it."""
        device = read_fleet(self.folder / FLEET_FILE).named(name)
        if device.public_key is None:
            return Client(device.address)
        return Client(device.address, read_key(key_path(self.folder / FLEET_FILE, name)), device.public_key)

    def acquainted(self, name, others=None):
        """Wait until it knows the others."""
        wanted = set(others if others is not None else self.running) - {name}
        with self.client(name) as client:
            until(lambda: wanted <= {n for n, state in states(client.status()).items() if state == "alive"})

    def end(self):
        """All of them."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def two_thirds(rng):
    """Two images of the tiny fleet, and their classes."""
    thirds = rng.integers(0, 3, 2)
    return bright(*thirds), thirds


class Load:
    """Closed-loop clients of one device; what became of their rows, and when."""

    def __init__(self, fleet, name, clients=4, deadline_s=1.0, draw=two_thirds):
        """draw: a random generator -> inputs, and the classes that they should be answered with"""
        self._draw = draw
        self.done, self.unanswered, self.wrong, self.degraded, self.refused = [], 0, 0, 0, []
        self._over, self._fleet, self._name, self._deadline_s = threading.Event(), fleet, name, deadline_s
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(clients)]

    def _run(self, seed):
        rng = np.random.default_rng(seed)
        with self._fleet.client(self._name) as client:
            while not self._over.is_set():
                inputs, due = self._draw(rng)
                try:
                    answers = client.infer(inputs, self._deadline_s)
                except CallError as error:
                    self.refused.append(str(error))
                    continue
                self.done.append(time.monotonic())
                self.unanswered += sum(not row.experts for row in answers.rows)
                self.degraded += sum(row.degraded for row in answers.rows)
                self.wrong += int((answers.outputs.argmax(1) != due).sum())

    def rate(self, start, end):
        """Requests a second between two moments."""
        return sum(start <= at < end for at in self.done) / (end - start)

    @property
    def sound(self):
        """Whether every row was answered, and rightly."""
        return not (self.unanswered or self.wrong or self.refused)

    def summary(self):
        """What must not be."""
        return f"{self.unanswered} unanswered, {self.wrong} wrong, {len(self.refused)} refused {self.refused[:2]}"

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()


class Impostor:
    """Listens at a device's address and greets as it would; what it does with an Ask is the test's choice."""

    def __init__(self, address, manifest, answer):
        """answer: an Ask -> frames to send back, or nothing."""
        self.asked = 0
        self._manifest, self._answer = manifest, answer
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(address)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        mine = self._manifest
        while not self._over.is_set():
            if not self._router.poll(20):
                continue
            route, *frames = self._router.recv_multipart()
            message = decode(frames)
            replies = []
            if isinstance(message, Hello):
                replies = [encode(Welcome(mine.device, mine.expert, message.trunk, (), 1, mine.digest))]
            elif isinstance(message, Ping):
                replies = [encode(Pong(message.request))]
            elif isinstance(message, Ask):
                self.asked += 1
                replies = self._answer(message)
            for reply in replies:
                self._router.send_multipart([route, *reply])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self._context.destroy(linger=0)
