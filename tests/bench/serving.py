"""Compares a device with the floor, a bare ZeroMQ loop: `make bench`, or python tests/bench/serving.py [SECONDS]

The floor is a pyzmq ROUTER loop around the same onnxruntime session, in its own process, without code of nmoe_edge. All
servers run at once and are measured in turn, in short blocks, so that other load affects them equally. Only prints.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zmq
from onnx import TensorProto, helper, numpy_helper

from nmoe_edge.bundle.fleet import FLEET_FILE, SCHEMA, Device, Fleet, read_fleet, write_fleet
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.bundle.manifest import InputSpec, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, sha256, trunk_digest
from nmoe_edge.bundle.selftest import SelfTest
from nmoe_edge.client import Client
from nmoe_edge.frames import receive_frames, send_frames
from nmoe_edge.keys import key_path, keys_folder, read_key, with_keys
from nmoe_edge.models import Graph
from nmoe_edge.protocol.messages import Ask
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import decode, encode

ROOT = Path(__file__).parents[2]
WIDTHS = (512, 256, 128, 64, 10)
EXPERTS = 5
DRAW = np.random.default_rng(0)
FLOOR = """
import sys, zmq, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[2])
print("ready", flush=True)
while True:
    route, data = router.recv_multipart()
    (out,) = session.run(None, {"rows": np.frombuffer(data, np.float32).reshape(-1, 512)})
    router.send_multipart([route, out.tobytes()])
"""


def mlp(widths):
    """Linear layers with ReLUs between them, as an ONNX file."""
    nodes = []
    weights = []
    last = "rows"
    for i, (width, after) in enumerate(itertools.pairwise(widths)):
        weights.append(numpy_helper.from_array((DRAW.normal(size=(width, after)) / width**0.5).astype("f4"), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(after, "f4"), f"b{i}"))
        out = "out" if i == len(widths) - 2 else f"z{i}"
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [out]))
        last = out
        if out != "out":
            nodes.append(helper.make_node("Relu", [out], [f"h{i}"]))
            last = f"h{i}"
    return model(nodes, widths[0], widths[-1], weights)


def model(nodes, row_in, row_out, weights=()):
    """An ONNX file of one graph: float rows in, float rows out."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", row])
        for name, row in (("rows", row_in), ("out", row_out))
    ]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], list(weights))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return made.SerializeToString(deterministic=True)


def fleet(folder, first_port):
    """Five devices: the extractor returns the rows, the gate their first five numbers, and the experts are MLPs."""
    identity = model([helper.make_node("Relu", ["rows"], ["out"])], 512, 512)
    chooser = numpy_helper.from_array(np.eye(512, EXPERTS, dtype="f4"), "w")
    gate = model([helper.make_node("MatMul", ["rows", "w"], ["out"])], 512, EXPERTS, [chooser])
    devices = []
    for number in range(EXPERTS):
        graphs = {"extractor.onnx": identity, "gate.onnx": gate, "expert.onnx": mlp(WIDTHS)}
        rows = np.abs(DRAW.normal(size=(2, 512))).astype("f4")
        rows[:, :EXPERTS] = 0
        rows[:, number] = 1
        outputs = Graph("expert", graphs["expert.onnx"], (512,), (10,))(rows)
        chosen = np.full((2, 1), number, np.int64)
        test = SelfTest(rows, rows, chosen, outputs, np.array(1e-3), np.array(1e-3))
        source = sha256(identity)
        manifest = Manifest(
            schema=1,
            device=f"device-{number}",
            experts=EXPERTS,
            expert=number,
            outputs=10,
            answers_carry_prior=False,
            input=InputSpec("float32", (512,), "none", "exact", (0.0, 9.0)),
            latent=LatentSpec(512, "float32"),
            routing=RoutingSpec(1, "outputs"),
            precision=PrecisionSpec("fp32", "fp32", "fp32"),
            target="any",
            opset=18,
            ir_version=8,
            accuracy={},
            extractor_source=source,
            trunk=trunk_digest(source, 512, EXPERTS, 10),
        )
        bundle = write_bundle(folder / manifest.device, manifest, {**graphs, "selftest.npz": test.write()})
        address = f"tcp://127.0.0.1:{first_port + number}"
        devices.append(Device(manifest.device, number, address, bundle.manifest.digest))
    write_fleet(folder / FLEET_FILE, Fleet(SCHEMA, tuple(devices)))
    return folder


@contextlib.contextmanager
def serving(*commands):
    """Start these commands, wait until each prints "ready", and end the processes afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        for c in commands
    ]
    try:
        for process, command in zip(running, commands, strict=True):
            if not process.stdout.readline().startswith("ready"):
                sys.exit(f"did not start to serve; is its port in use? {' '.join(command[-2:])}")
        yield running
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve(bundle, *options):
    """The command line that serves a bundle."""
    return [sys.executable, "-m", "nmoe_edge", "serve", str(bundle), "--state", str(bundle.parent / "state"), *options]


class Caller:
    """Calls the expert of one server, one call at a time or several at once."""

    def __init__(self, address, ask=None, secure=None, calls=8):
        """ask: (number, row) -> frames; None sends the bare bytes of a row, as the floor expects

        secure: (public, secret, server's public) CURVE keys; calls: sockets, each with one call at a time
        """
        self.sockets = [zmq.Context.instance().socket(zmq.DEALER) for _ in range(calls)]
        for socket in self.sockets:
            if secure:
                socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = secure
            socket.connect(address)
        self.ask = ask
        self.row = DRAW.normal(size=(1, 512)).astype("f4")
        self.numbers = itertools.count(1)

    def send(self, socket):
        """Send one call."""
        send_frames(socket, self.ask(next(self.numbers), self.row) if self.ask else [self.row.tobytes()])

    def receive(self, socket):
        """Receive and decode its answer."""
        first, rest = receive_frames(socket)
        return decode([first.bytes, *rest]).outputs.unpack() if self.ask else np.frombuffer(first.bytes, "f4")

    def one_by_one(self, seconds):
        """Latencies of calls sent one after another for so many seconds."""
        socket = self.sockets[0]
        took = []
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            self.send(socket)
            self.receive(socket)
            took.append(time.perf_counter() - began)
        return took

    def at_once(self, seconds):
        """Calls per second while every socket always has one call open."""
        poller = zmq.Poller()
        for socket in self.sockets:
            poller.register(socket, zmq.POLLIN)
            self.send(socket)
        count = 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            for socket, _ in poller.poll():
                self.receive(socket)
                self.send(socket)
                count += 1
        rate = count / (time.perf_counter() - began)
        for socket in self.sockets:
            self.receive(socket)
        return rate


def ask_of(trunk, expert):
    """A function that encodes an Ask for each call."""
    return lambda number, row: encode(Ask(number, 0, 1000, expert, trunk, Tensor.pack(row, "float32")))


def expert_calls(folder, seconds):
    """Compare one remote expert: the floor, a device, and a device with CURVE."""
    plain = fleet(folder / "plain", 17101)
    keyed = fleet(folder / "keyed", 17201)
    names = [f"device-{i}" for i in range(EXPERTS)]
    secured = with_keys(read_fleet(keyed / FLEET_FILE), names, keys_folder(keyed / FLEET_FILE))
    write_fleet(keyed / FLEET_FILE, secured)
    floor_address = "tcp://127.0.0.1:17100"
    floor = [sys.executable, "-c", FLOOR, str(plain / "device-0" / "expert.onnx"), floor_address]
    device = serve(plain / "device-0")
    device_with_keys = serve(keyed / "device-0")
    trunk = read_bundle(plain / "device-0").manifest.trunk_bytes
    with serving(floor, device, device_with_keys):
        pair = read_key(key_path(keyed / FLEET_FILE, "device-1"))
        secure = pair.public.encode(), pair.secret.encode(), secured.device[0].public_key.encode()
        trunk_keyed = read_bundle(keyed / "device-0").manifest.trunk_bytes
        callers = {
            "floor": Caller(floor_address),
            "a device": Caller("tcp://127.0.0.1:17101", ask_of(trunk, 0)),
            "with CURVE": Caller("tcp://127.0.0.1:17201", ask_of(trunk_keyed, 0), secure),
        }
        for caller in callers.values():
            caller.one_by_one(0.3)
        took = {name: [] for name in callers}
        rates = {name: [] for name in callers}
        for _ in range(10):
            for name, caller in callers.items():
                took[name] += caller.one_by_one(seconds / 10)
        for _ in range(5):
            for name, caller in callers.items():
                rates[name].append(caller.at_once(seconds / 5))
    print(f"\na remote expert ({'-'.join(map(str, WIDTHS))}), one row of 512 floats; × is relative to the floor")
    print(f"{'':<12}{'p50 µs':>9}{'':>8}{'p99 µs':>9}{'':>8}{'8 callers, /s':>14}")
    base = None
    for name in callers:
        p50 = float(np.percentile(took[name], 50)) * 1e6
        p99 = float(np.percentile(took[name], 99)) * 1e6
        rate = statistics.median(rates[name])
        base = base or (p50, p99, rate)
        print(
            f"{name:<12}{p50:>9.0f}{p50 / base[0]:>7.2f}×{p99:>9.0f}{p99 / base[1]:>7.2f}×"
            f"{rate:>14,.0f}{rate / base[2]:>7.2f}×"
        )


def whole_path(folder, seconds):
    """Send inputs through a device to the experts of four others, one at a time and 64 together."""
    plain = folder / "plain"
    commands = [serve(plain / f"device-{i}", "--local-first", "1", "--no-hedge") for i in range(EXPERTS)]
    with serving(*commands), Client("tcp://127.0.0.1:17101") as client:
        while sum(peer["state"] == "alive" for peer in client.status()["peers"]) < EXPERTS - 1:
            time.sleep(0.1)
        rows = np.abs(DRAW.normal(size=(64, 512))).astype("f4")
        rows[:, :EXPERTS] = 0
        rows[np.arange(64), 1 + np.arange(64) % 4] = 9
        before = client.status()["counts"].get("asks", 0)
        client.infer(rows)
        messages = client.status()["counts"]["asks"] - before
        single = []
        together = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            for row in rows[:16]:
                client.infer(row[None])
            single.append(16 / (time.perf_counter() - began))
            began = time.perf_counter()
            client.infer(rows)
            together.append(64 / (time.perf_counter() - began))
    one = statistics.median(single)
    many = statistics.median(together)
    print("\nrows through a device to four remote experts")
    print(f"one at a time {one:,.0f} rows/s; 64 together {many:,.0f} rows/s = {many / one:.1f}×, {messages} messages")


def main(seconds=5.0):
    """Run both comparisons. seconds: for each server"""
    with tempfile.TemporaryDirectory() as name:
        expert_calls(Path(name), seconds)
        whole_path(Path(name), seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started are ended
    main(*map(float, sys.argv[1:2]))
