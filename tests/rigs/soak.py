"""Faults against a fleet under load: `make soak`, or python tests/rigs/soak.py [FAULT...]

Devices are real processes on loopback, killed and frozen by real signals. Prints each measured figure with its target.
Exits 1 if a row was not answered, an answer was wrong or a device did not survive. A rate is compared with the rate of
the same fleet in the same run.
"""

from __future__ import annotations

import itertools
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import zmq

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from bench.serving import fleet as bench_fleet  # noqa: E402
from edge.fleets import (  # noqa: E402
    NAMES,
    Load,
    Processes,
    address_of,
    bright,
    copied_fleet,
    mangled,
    pin_bundle,
    sound_frames,
    states,
    wait_until,
)

from nmoe_edge.bundle.folder import read_bundle, write_bundle  # noqa: E402
from nmoe_edge.models import Models  # noqa: E402
from nmoe_edge.protocol.messages import Infer, Ping, Pong  # noqa: E402
from nmoe_edge.protocol.tensor import Tensor  # noqa: E402
from nmoe_edge.protocol.wire import decode, encode  # noqa: E402

failures = []
"""Promises that were broken; any makes the exit status 1."""


def show(fault, measured, target, reached):
    """Print one line of the table. A missed target is marked, but does not change the exit status."""
    print(f"{fault:<50} {measured:<52} target: {target}{'' if reached else '   MISSED'}", flush=True)


def must(holds, failure):
    """Record a failure unless a promise of the device holds."""
    if not holds:
        failures.append(failure)
        print(f"  FAILED: {failure}", flush=True)


def memory_kb(process):
    """Resident memory of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def descriptors(process):
    """Number of open files of a process."""
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def five(folder):
    """A fleet of five devices, and a function that draws rows with their classes, evenly over the experts."""
    made = copied_fleet(bench_fleet(folder.parent / "made", 1), folder.parent / "five")
    rows = np.abs(np.random.default_rng(0).normal(size=(200, 512))).astype("f4")
    experts = np.arange(len(rows)) % 5  # the expert that the gate picks for each row
    rows[:, :5] = 9 * np.eye(5, dtype="f4")[experts]
    classes = np.stack([Models(read_bundle(made / f"device-{i}")).expert(rows).argmax(1) for i in range(5)])

    def draw(rng):
        drawn = rng.integers(0, len(rows), 2)
        return rows[drawn], classes[experts[drawn], drawn]

    return made, draw


def frozen(folder, seconds=10):
    """Stop one of four peers under load; compare the rate with the rate without that peer, before and after."""
    folder, draw = five(folder)
    names = [f"device-{i}" for i in range(5)]

    def rate():
        start = time.monotonic()
        time.sleep(seconds)
        return load.rate(start, start + seconds)

    with Processes(folder, *names) as fleet:
        fleet.wait_for_peers(names[0])
        fleet.kill(names[-1])
        with Load(fleet, names[0], draw=draw) as load, fleet.client(names[0]) as client:
            time.sleep(2)
            rates_without = [rate()]
            fleet.start(names[-1])
            fleet.ready(names[-1])
            wait_until(lambda: states(client.status())[names[-1]] == "alive")
            time.sleep(2)
            stopped_at = time.monotonic()
            fleet.signal(names[-1], signal.SIGSTOP)
            wait_until(lambda: states(client.status())[names[-1]] == "silent")
            opened_s = time.monotonic() - stopped_at
            time.sleep(seconds - opened_s)
            rate_stopped = load.rate(stopped_at, stopped_at + seconds)
            fleet.kill(names[-1])
            time.sleep(1)
            rates_without.append(rate())
    show("SIGSTOP of one of four peers: breaker opens after", f"{opened_s:.2f} s", "1.5 s", opened_s <= 1.5)
    share = rate_stopped / statistics.mean(rates_without)
    show(
        f"  rate in the {seconds} s from SIGSTOP on", f"{share:.0%} of the rate without that peer", "90 %", share >= 0.9
    )
    # Classes are not checked: a substitute expert may rightly name another class.
    must(not (load.unanswered or load.refused), f"frozen: {load.summary()}")


def killed(folder, times=20):
    """Kill and restart peers in random order, under load."""
    back_s = []
    chance = random.Random(0)
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        with Load(fleet, "attic") as load, fleet.client("attic") as client:
            for _ in range(times):
                name = chance.choice(NAMES[1:])
                time.sleep(chance.uniform(0.1, 0.5))
                fleet.kill(name)
                time.sleep(chance.uniform(0, 0.5))
                started = time.monotonic()
                fleet.start(name)
                fleet.ready(name)
                wait_until(lambda name=name: states(client.status())[name] == "alive")
                back_s.append(time.monotonic() - started)
    text = f"asked again {statistics.median(back_s):.2f} s after restart, {max(back_s):.2f} s at most"
    show(f"SIGKILL and restart, {times} times", text, "2 s", max(back_s) <= 2)
    show("  rows", f"{2 * len(load.done)}, {load.unanswered} unanswered, {load.wrong} wrong", "0 and 0", True)
    must(load.sound, f"killed: {load.summary()}")


def alone(folder):
    """Kill all peers: every row is answered locally and marked as degraded."""
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        for name in NAMES[1:]:
            fleet.kill(name)
        with Load(fleet, "attic") as load:
            time.sleep(3)
    rows = 2 * len(load.done)
    show(
        "all peers killed", f"{rows} rows, {load.unanswered} unanswered, {load.degraded} degraded", "0 unanswered", True
    )
    must(not load.unanswered and not load.refused, "alone: a row was not answered")


def overload(folder, seconds=8.0):
    """Send a device three times the requests it can answer: measure answers, lateness and memory."""
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        process = fleet.running["attic"]
        rate = 1000.0
        capacity = send_at(folder, rate, 2.0)[0]
        while rate < 1.3 * capacity + 1000:  # until a higher rate brings no more answers
            rate *= 1.3
            capacity = max(capacity, send_at(folder, rate, 2.0)[0])
        before = memory_kb(process)
        goodput, late, refused = send_at(folder, 3 * capacity, seconds)
        grown = memory_kb(process) - before
    text = f"{goodput:,.0f} of {capacity:,.0f} requests/s = {goodput / capacity:.0%}"
    show("three times the capacity: answered in time", text, "85 %", goodput >= 0.85 * capacity)
    latest = max(late) * 1000
    text = f"{latest:.0f} ms, of {len(late)} answers; {refused} refused"
    show("  latest answer after its deadline", text, "50 ms", latest <= 50)
    show("  memory grew", f"{grown / 1024:.1f} MB", "bounded", grown < 64 * 1024)


def send_at(folder, rate, seconds, deadline_s=0.2):
    """Send requests at a fixed rate, without waiting for answers.

    Returns the answers in time per second, the seconds by which each answer was late (negative: early), and the number
    of refusals.
    """
    payload = Tensor.pack(bright(0, 1), "uint8")
    late = []
    in_time = 0
    refused = 0
    sent_at = {}
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            dealer.setsockopt(option, 0)
        dealer.connect(address_of(folder, "attic"))
        began = time.monotonic()
        numbers = itertools.count(1)
        while (now := time.monotonic()) < began + seconds + 1:
            to_send = int(min(now - began, seconds) * rate) - len(sent_at)
            for _ in range(min(to_send, 200)):
                number = next(numbers)
                sent_at[number] = time.monotonic()
                dealer.send_multipart(encode(Infer(number, 0, int(deadline_s * 1000), payload)))
            while dealer.poll(1 if to_send <= 0 else 0):
                reply = decode(dealer.recv_multipart())
                took = time.monotonic() - sent_at[reply.request]
                if type(reply).__name__ == "Result":
                    in_time += took <= deadline_s
                    late.append(took - deadline_s)
                else:
                    refused += 1
    return in_time / seconds, late, refused


def hostile(folder, count=1_000_000):
    """Send random and mutated messages to a serving device."""
    rng = np.random.default_rng(0)
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        process = fleet.running["attic"]
        sound = sound_frames(read_bundle(folder / "attic").manifest)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(address_of(folder, "attic"))
            before = 0
            for i in range(count):
                dealer.send_multipart(mangled(rng, sound))
                while dealer.poll(0):
                    dealer.recv_multipart()
                if i == count // 10:
                    before = memory_kb(process)
            ping = encode(Ping(2**40))

            def answered():
                """Whether a Ping is answered, which means that everything before it has been read."""
                dealer.send_multipart(ping)
                while dealer.poll(200):
                    if decode(dealer.recv_multipart()) == Pong(2**40):
                        return True
                return False

            wait_until(answered, 60)
        grown = memory_kb(process) - before
        with fleet.client("attic") as client:
            wait_until(lambda: client.status()["under_way"] == 0)
            counts = client.status()["counts"]
            must(client.infer(bright(0)).rows[0].experts == (0,), "hostile: the device no longer answers")
        must("bugs" not in counts, "hostile: a message caused an unexpected exception")
    text = f"{counts['messages_malformed']:,} rejected; memory grew {grown / 1024:.1f} MB"
    show(f"{count:,} random and mutated messages", text, "10 MB, no crash", grown < 10 * 1024)


def trickle(folder):
    """Connect and send one byte a second: measure when the device disconnects, and the rate of its other clients."""
    host, port = address_of(folder, "attic").removeprefix("tcp://").split(":")
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        with Load(fleet, "attic") as load:
            time.sleep(5)
            began = time.monotonic()
            rate_before = load.rate(began - 4, began)
            with socket.create_connection((host, int(port))) as slow:
                slow.settimeout(1)
                with suppress(OSError):
                    for _ in range(64):
                        slow.sendall(b"\xff")
                        with suppress(TimeoutError):
                            if not slow.recv(4096):
                                break
            ended = time.monotonic()
            time.sleep(4)
            rate_after = load.rate(ended, ended + 4)
            share = load.rate(began, ended) / statistics.mean((rate_before, rate_after))
    open_s = ended - began
    text = f"{open_s:.0f} s; others at {share:.0%} of their rate"
    show("one byte a second: disconnected after", text, "others at 90 %", share > 0.9)
    must(load.sound and open_s < 30, f"trickle: {load.summary()}, {open_s:.0f} s")


def reloads(folder, times=100):
    """Replace the bundle and reload, again and again, under load."""
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        with Load(fleet, "attic") as load, fleet.client("attic") as client:
            for target in itertools.islice(itertools.cycle(("pi", "x86")), times):
                bundle = read_bundle(folder / "attic")
                changed = write_bundle(folder / "attic", replace(bundle.manifest, target=target), bundle.contents)
                pin_bundle(folder, changed)
                fleet.signal("attic", signal.SIGHUP)
                wait_until(lambda changed=changed: client.status()["bundle"] == changed.manifest.digest)
    failed = load.unanswered + load.wrong + len(load.refused)
    show(f"{times} reloads under load", f"{len(load.done):,} requests, {failed} failed", "0 failed", not failed)
    must(not failed, f"reloads: {load.refused[:2]}")


def requests(folder, count=1_000_000):
    """Answer very many requests: memory and open files must not grow in the second half."""
    with Processes(folder) as fleet:
        fleet.wait_for_peers("attic")
        process = fleet.running["attic"]
        seen = []  # (memory, open files)
        images = bright(*[0, 1, 2] * 10)
        with fleet.client("attic") as client:
            step = max(1, count // 20 // len(images)) * len(images)
            for done in range(0, count, len(images)):
                if done % step == 0:
                    seen.append((memory_kb(process), descriptors(process)))
                must(all(row.experts for row in client.infer(images, 5.0).rows), "requests: a row was not answered")
        seen.append((memory_kb(process), descriptors(process)))
    half = seen[len(seen) // 2]
    grown = seen[-1][0] - half[0]
    opened = seen[-1][1] - half[1]
    text = f"second half: {grown / 1024:+.1f} MB, {opened:+d} open files; {seen[-1][0] / 1024:.0f} MB in all"
    show(f"{count:,} rows", text, "no growth", grown < 2048 and opened <= 0)


FAULTS = {
    "frozen": frozen,
    "killed": killed,
    "alone": alone,
    "overload": overload,
    "hostile": hostile,
    "trickle": trickle,
    "reloads": reloads,
    "requests": requests,
}


def main(chosen):
    """Run the named faults, or all."""
    if any(name.partition("=")[0] not in FAULTS for name in chosen):
        sys.exit(f"{__doc__}\nFAULT: {', '.join(FAULTS)}; with a number of times or seconds, as in killed=5")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started are ended
    for name in chosen or FAULTS:
        fault, _, count = name.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            keyed = fault not in ("overload", "hostile")
            fleet = copied_fleet(TESTS / "tiny" / "fleet", Path(folder) / "fleet", keyed=keyed)
            FAULTS[fault](fleet, *([int(count)] if count else []))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
