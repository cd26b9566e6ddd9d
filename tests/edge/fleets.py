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
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for reserved in sockets:
            reserved.bind(("127.0.0.1", 0))
        return [reserved.getsockname()[1] for reserved in sockets]


def copied_fleet(source, folder, keyed=False):
    """A copy of a fleet's folder with free ports on loopback; keyed: with keys for every device."""
    shutil.copytree(source, folder)
    fleet = read_fleet(folder / FLEET_FILE)
    ports = free_ports(len(fleet.device))
    devices = [replace(d, address=f"tcp://127.0.0.1:{p}") for d, p in zip(fleet.device, ports, strict=True)]
    fleet = replace(fleet, device=tuple(devices))
    if keyed:
        fleet = with_keys(fleet, [d.name for d in devices], keys_folder(folder / FLEET_FILE))
    write_fleet(folder / FLEET_FILE, fleet)
    return folder


def pin_bundle(folder, bundle):
    """Write this bundle's digest into fleet.toml."""
    fleet = read_fleet(folder / FLEET_FILE)
    manifest = bundle.manifest
    devices = (replace(d, bundle=manifest.digest) if d.name == manifest.device else d for d in fleet.device)
    write_fleet(folder / FLEET_FILE, replace(fleet, device=tuple(devices)))


def bright(*thirds):
    """Images, uint8 (n, 1, 6, 6), each bright in one third; the gate sends it to the expert of that number."""
    images = np.full((len(thirds), 1, 6, 6), 10, np.uint8)
    for image, third in zip(images, thirds, strict=True):
        image[0, 2 * third : 2 * third + 2] = 200
    return images


def wait_until(holds, seconds=10.0):
    """Wait until a condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)


def states(report):
    """Peer name -> state, from a status report."""
    return {peer["name"]: peer["state"] for peer in report["peers"]}


def alive_peers(report):
    """The names of the peers that are alive, from a status report."""
    return {name for name, state in states(report).items() if state == "alive"}


def address_of(folder, name):
    """The address of a device in fleet.toml."""
    return read_fleet(folder / FLEET_FILE).named(name).address


def answered_by(device, image):
    """The experts that answer an image; None while the device is still busy with earlier requests."""
    with contextlib.suppress(CallError):
        return device.infer(image).rows[0].experts


def answering(ask, number=0, expert=2, shape=None):
    """An Answer to this Ask, as frames. number is added to its request number; the defaults make a correct answer."""
    outputs = np.ones(shape or (ask.latents.rows, 3), np.float32)
    return encode(Answer(ask.request + number, expert, 1, Tensor.pack(outputs, "float32")))


def sound_frames(manifest):
    """One valid message of every kind that a device accepts, as frames."""
    trunk = manifest.trunk_bytes
    return [
        encode(Ask(5, 0, 1000, manifest.expert, trunk, Tensor.pack(np.ones((2, 4), "f4"), "float32"))),
        encode(Infer(6, 0, 1000, Tensor.pack(bright(0, 1), "uint8"))),
        encode(Ping(7)),
        encode(Hello("barn", 1, trunk)),
        encode(Status(8)),
    ]


def mangled(rng, sound, least=0):
    """One of these messages with up to three bytes changed, at least `least`; every fifth is frames of random bytes."""
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
    """Serve devices of a fleet in this process, once all of them are alive to each other."""
    with contextlib.ExitStack() as running:
        started = []
        for name in names or NAMES:
            node = Node(folder / name, folder / FLEET_FILE, rules=rules, log=StderrLog(name), **options)
            running.callback(node.close)
            started.append(node)
        for node in started:
            others = {other.models.manifest.device for other in started if other is not node}
            wait_until(lambda node=node, others=others: others <= alive_peers(node.status()))
        yield started


def serve_command(folder, name, *options):
    """The command that serves a device."""
    state = str(folder.parent / "state")
    return [sys.executable, "-m", "nmoe_edge", "serve", str(folder / name), "--state", state, *options]


class Processes:
    """Devices of a fleet, each in a process of its own."""

    def __init__(self, folder, *names, options=()):
        self.folder = folder
        self.options = options
        self.running = {}
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
        return serve_command(self.folder, name, *self.options)

    def start(self, name):
        """Start a device, or start it again; `ready` waits until it serves."""
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
        """Wait for the device's ready line and return it."""
        line = self.running[name].stdout.readline()
        assert line.startswith("ready: "), (self.logs / name).read_text()
        return line

    def signal(self, name, which):
        os.kill(self.running[name].pid, which)

    def kill(self, name):
        """End a device without a goodbye."""
        self.running[name].kill()
        self.running[name].wait()
        self.running[name].stdout.close()

    def client(self, name):
        """A client of the device, with its own key if it has one."""
        device = read_fleet(self.folder / FLEET_FILE).named(name)
        if device.public_key is None:
            return Client(device.address)
        return Client(device.address, read_key(key_path(self.folder / FLEET_FILE, name)), device.public_key)

    def wait_for_peers(self, name, others=None):
        """Wait until the other devices are alive to this one."""
        wanted = set(others if others is not None else self.running) - {name}
        with self.client(name) as client:
            wait_until(lambda: wanted <= alive_peers(client.status()))

    def end(self):
        """End all processes."""
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
    """Two random images of the tiny fleet, and their classes."""
    thirds = rng.integers(0, 3, 2)
    return bright(*thirds), thirds


class Load:
    """Clients of one device that ask again as soon as they are answered; counts how their rows were answered."""

    def __init__(self, fleet, name, clients=4, deadline_s=1.0, draw=two_thirds):
        """draw: a random generator -> inputs, and their expected classes"""
        self._draw = draw
        self._fleet = fleet
        self._name = name
        self._deadline_s = deadline_s
        self.done = []
        """The time of every answer."""
        self.unanswered = 0
        self.wrong = 0
        self.degraded = 0
        self.refused = []
        """The text of every refusal."""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(clients)]

    def _run(self, seed):
        rng = np.random.default_rng(seed)
        with self._fleet.client(self._name) as client:
            while not self._over.is_set():
                inputs, expected = self._draw(rng)
                try:
                    answers = client.infer(inputs, self._deadline_s)
                except CallError as error:
                    self.refused.append(str(error))
                    continue
                self.done.append(time.monotonic())
                self.unanswered += sum(not row.experts for row in answers.rows)
                self.degraded += sum(row.degraded for row in answers.rows)
                self.wrong += int((answers.outputs.argmax(1) != expected).sum())

    def rate(self, start, end):
        """Answered requests per second between two times."""
        return sum(start <= at < end for at in self.done) / (end - start)

    @property
    def sound(self):
        """Whether every row was answered, and correctly."""
        return not (self.unanswered or self.wrong or self.refused)

    def summary(self):
        """What went wrong, as text."""
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
    """Listens at a device's address and greets as it would; the test chooses how it answers an Ask."""

    def __init__(self, address, manifest, answer):
        """answer: an Ask -> a list of messages to send back, each a list of frames"""
        self.asked = 0
        """Asks received."""
        self._manifest = manifest
        self._answer = answer
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
