"""Measures a whole fleet, one process per device, with CURVE: python tests/bench/fleet.py FLEET INPUTS.npz

FLEET is the folder of a fleet with keys: from nmoe-export, then nmoe-edge keygen. INPUTS.npz holds inputs, labels and
clients, such as a run's calibration.npz; each row is sent to the device of its client. Only prints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from serving import FLOOR, Caller, serve, serving

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.client import Client
from nmoe_edge.keys import key_path, read_key
from nmoe_edge.models import Models

PREFER_NEAR = ("0", "0.02", "0.2", "2")
"""Values of --prefer-near: score that a peer loses per millisecond."""


def clients(folder, stack):
    """A client for every device."""
    path = folder / FLEET_FILE
    found = []
    for device in read_fleet(path).device:
        keys = (read_key(key_path(path, device.name)), device.public_key) if device.public_key else ()
        found.append(stack.enter_context(Client(device.address, *keys)))
    return found


def wait_until_alive(all_clients):
    """Wait until every device sees all its peers alive."""
    for client in all_clients:
        while any(peer["state"] != "alive" for peer in client.status(10.0)["peers"]):
            time.sleep(0.1)


def memory_mib(process, field):
    """A memory figure of a process. field: VmRSS or VmHWM of /proc/PID/status"""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def cpu_s(process):
    """CPU seconds used by a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commands(folder, *options):
    """The command lines that serve all devices."""
    return [serve(folder / device.name, *options) for device in read_fleet(folder / FLEET_FILE).device]


def one_device(folder, inputs):
    """Time to ready, idle load and memory of one device, while its peers serve too."""
    bundle = read_bundle(folder / "device-00")
    size = sum(len(data) for data in bundle.contents.values()) / 2**20
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        (process,) = stack.enter_context(serving(serve(folder / "device-00")))
        ready = time.monotonic() - began
        others = [command for command in commands(folder) if str(folder / "device-00") not in command]
        stack.enter_context(serving(*others))
        wait_until_alive(clients(folder, stack))
        time.sleep(2)
        before = cpu_s(process)
        rss = memory_mib(process, "VmRSS")
        time.sleep(10)
        idle = (cpu_s(process) - before) / 10
        asked = clients(folder, stack)[0]
        for number in range(10_000):
            asked.infer(inputs[number % len(inputs)][None], 5.0)
        after = memory_mib(process, "VmRSS")
        peak = memory_mib(process, "VmHWM")
    print(f"one device: ready {ready:.2f} s after its process started (target 1.0)")
    print(f"idle, with {len(others)} peers: {idle:.1%} of a core (target 1 %)")
    print(
        f"memory: {rss:.0f} MiB when ready, {after:.0f} MiB after 10,000 requests, {peak:.0f} MiB at most;"
        f" the bundle has {size:.1f} MiB, 51 + 3 x that is {51 + 3 * size:.0f} MiB"
    )


def all_devices(folder, inputs, labels, owners):
    """Accuracy, share answered locally and latency, for each value of --prefer-near."""
    print(f"\n{'prefer-near':<13}{'right':>8}{'local':>9}{'degraded':>10}{'p50 ms':>8}{'p99 ms':>8}")
    for near in PREFER_NEAR:
        with contextlib.ExitStack() as stack:
            stack.enter_context(serving(*commands(folder, "--prefer-near", near, "--no-adapt")))
            asked = clients(folder, stack)
            wait_until_alive(asked)
            took = []
            right = 0
            degraded = 0
            for turn in range(3):  # in the first the devices measure the latency of their peers
                for row, label, owner in zip(inputs, labels, owners, strict=True):
                    began = time.perf_counter()
                    answers = asked[owner].infer(row[None], 5.0)
                    if turn:
                        took.append(time.perf_counter() - began)
                        right += int(answers.outputs[0].argmax() == label)
                        degraded += answers.rows[0].degraded
            counts = [client.status()["counts"] for client in asked]
        local = sum(c.get("rows_local", 0) for c in counts) / sum(c["rows"] for c in counts)
        p50, p99 = np.percentile(took, [50, 99]) * 1000
        n = len(took)
        print(f"{near:<13}{right / n:>8.1%}{local:>9.1%}{degraded / n:>10.1%}{p50:>8.2f}{p99:>8.2f}")


def whole_path(folder, inputs):
    """Compare an input that a peer answers with the sum of its parts."""
    models = Models(read_bundle(folder / "device-00"))
    latents = models.extractor(inputs)
    remote = np.flatnonzero(models.gate(latents).argmax(1) != models.manifest.expert)
    if not len(remote):
        print("\nthe gate of device-00 sends none of these inputs to a peer")
        return
    rows = inputs[remote]
    options = ("--local-first", "1", "--no-hedge", "--no-adapt")
    address = "tcp://127.0.0.1:17100"
    with contextlib.ExitStack() as stack:
        expert = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".onnx"))
        expert.write(read_bundle(folder / "device-00").contents["expert.onnx"])
        expert.flush()
        stack.enter_context(serving(*commands(folder, *options), floor_of(expert.name, address, models)))
        asked = clients(folder, stack)
        wait_until_alive(asked)
        floor = Caller(address)
        floor.row = np.array(latents[:1])
        whole = []  # seconds on the device
        parts = []  # (seconds for extractor and gate, for the floor's call, seen by the client)
        for turn in range(600):
            row = rows[turn % len(rows)][None]
            began = time.perf_counter()
            answers = asked[0].infer(row, 5.0)
            ended = time.perf_counter()
            models.gate(models.extractor(row))
            computed = time.perf_counter()
            floor.send(floor.sockets[0])
            floor.receive(floor.sockets[0])
            asked_floor = time.perf_counter()
            if turn >= 100 and answers.rows[0].experts != (0,):
                whole.append(answers.elapsed_s)
                parts.append((computed - ended, asked_floor - computed, ended - began))
    front, call, client = np.median(parts, axis=0) * 1000
    total = float(np.median(whole)) * 1000
    print(
        f"\nan input that a peer answers: {total:.2f} ms on the device ({client:.2f} seen by its client);"
        f" extractor and gate {front:.2f} + floor with expert {call:.2f} = {front + call:.2f} ms:"
        f" {total / (front + call):.2f} x"
    )


def floor_of(expert, address, models):
    """The command line of the floor with this expert."""
    name = models.expert._input.name
    code = FLOOR.replace('"rows"', repr(name)).replace("512", str(models.manifest.latent.dim))
    return [sys.executable, "-c", code, expert, address]


def main(folder, npz):
    """Run all measurements."""
    with np.load(npz) as arrays:
        inputs = arrays["inputs"]
        labels = arrays["labels"]
        owners = arrays["clients"]
    one_device(Path(folder), inputs)
    whole_path(Path(folder), inputs)
    all_devices(Path(folder), inputs, labels, owners)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1], FLEET_FILE).is_file():
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started are ended
    main(*sys.argv[1:])
