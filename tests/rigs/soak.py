"""What a fleet lives through, at length: `make soak`, or python tests/rigs/soak.py [FAULT...]

Real processes on loopback, under load, killed and frozen by real signals. Prints what was seen beside what is aimed at,
and exits 1 when a row went unanswered, an answer was wrong or a node did not survive. Rates are compared with the same
fleet's own in the same run.
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
    mangled,
    pinned,
    settled,
    sound_frames,
    states,
    until,
)

from nmoe_edge.bundle.folder import read_bundle, write_bundle  # noqa: E402
from nmoe_edge.models import Models  # noqa: E402
from nmoe_edge.protocol.messages import Infer, Ping, Pong  # noqa: E402
from nmoe_edge.protocol.tensor import Tensor  # noqa: E402
from nmoe_edge.protocol.wire import decode, encode  # noqa: E402

bad = []
"""What must not be, and was."""


def show(what, seen, aim, fine):
    """One line of the table."""
    print(f"{what:<44} {seen:<44} aim: {aim}{'' if fine else '   FELL SHORT'}", flush=True)


def must(holds, what):
    """What is no figure but a promise."""
    if not holds:
        bad.append(what)
        print(f"  BROKEN: {what}", flush=True)


def memory_kb(process, what="VmRSS"):
    """Of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def descriptors(process):
    """Files that a process has open."""
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def five(folder):
    """A fleet of five devices, and rows of which each expert gets as many, with the classes that it says they are."""
    made = settled(bench_fleet(folder.parent / "made", 1), folder.parent / "five")
    rows = np.abs(np.random.default_rng(0).normal(size=(200, 512))).astype("f4")
    wanted = np.arange(len(rows)) % 5
    rows[:, :5] = 9 * np.eye(5, dtype="f4")[wanted]
    said = np.stack([Models(read_bundle(made / f"device-{i}")).expert(rows).argmax(1) for i in range(5)])

    def draw(rng):
        chosen = rng.integers(0, len(rows), 2)
        return rows[chosen], said[wanted[chosen], chosen]

    return made, draw


def frozen(folder, seconds=10):
    """One peer of four is stopped under load; the rate is compared with that in its absence, before and after."""
    folder, draw = five(folder)
    names = [f"device-{i}" for i in range(5)]

    def rate():
        at = time.monotonic()
        time.sleep(seconds)
        return load.rate(at, at + seconds)

    with Processes(folder, *names) as fleet:
        fleet.acquainted(names[0])
        fleet.kill(names[-1])
        with Load(fleet, names[0], draw=draw) as load, fleet.client(names[0]) as client:
            time.sleep(2)
            absent = [rate()]
            fleet.start(names[-1])
            fleet.ready(names[-1])
            until(lambda: states(client.status())[names[-1]] == "alive")
            time.sleep(2)
            at = time.monotonic()
            fleet.signal(names[-1], signal.SIGSTOP)
            until(lambda: states(client.status())[names[-1]] == "silent")
            opened = time.monotonic() - at
            time.sleep(seconds - opened)
            stopped = load.rate(at, at + seconds)
            fleet.kill(names[-1])
            time.sleep(1)
            absent.append(rate())
    show("SIGSTOP of one peer of four: breaker open after", f"{opened:.2f} s", "1.5 s", opened <= 1.5)
    share = stopped / statistics.mean(absent)
    show("  rate of the ten seconds from then on", f"{share:.0%} of that with the peer absent", "90 %", share >= 0.9)
    # Another expert of these may well name another class: that is not wrong.
    must(not (load.unanswered or load.refused), f"frozen: {load.summary()}")


def killed(folder, times=20):
    """Peers are killed and started again, in random order, under load."""
    back = []
    chance = random.Random(0)
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        with Load(fleet, "attic") as load, fleet.client("attic") as client:
            for _ in range(times):
                name = chance.choice(NAMES[1:])
                time.sleep(chance.uniform(0.1, 0.5))
                fleet.kill(name)
                time.sleep(chance.uniform(0, 0.5))
                at = time.monotonic()
                fleet.start(name)
                fleet.ready(name)
                until(lambda name=name: states(client.status())[name] == "alive")
                back.append(time.monotonic() - at)
    text = f"in use {statistics.median(back):.2f} s after its start, {max(back):.2f} s at most"
    show(f"SIGKILL and restart, {times} times", text, "2 s", max(back) <= 2)
    show("  rows", f"{2 * len(load.done)}, {load.unanswered} unanswered, {load.wrong} wrong", "0 and 0", True)
    must(load.sound, f"killed: {load.summary()}")


def alone(folder):
    """All peers die: every row is answered at home and says so."""
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        for name in NAMES[1:]:
            fleet.kill(name)
        with Load(fleet, "attic") as load:
            time.sleep(3)
    rows = 2 * len(load.done)
    show("all peers dead", f"{rows} rows, {load.unanswered} unanswered, {load.degraded} degraded", "0 unanswered", True)
    must(not load.unanswered and not load.refused, "alone: a row went unanswered")


def overload(folder, seconds=8.0):
    """Three times what a device can do, open loop: what it still does, how late, and its memory."""
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        process, rate, capacity = fleet.running["attic"], 1000.0, 0.0
        while (
            rate < 1.3 * (capacity := max(capacity, poured(folder, rate, 2.0)[0])) + 1000
        ):  # until more brings no more
            rate *= 1.3
        before = memory_kb(process)
        goodput, late, refused = poured(folder, 3 * capacity, seconds)
        grown = memory_kb(process) - before
    text = f"{goodput:,.0f} of {capacity:,.0f} requests/s = {goodput / capacity:.0%}"
    show("3 × overload: answered in time", text, "85 %", goodput >= 0.85 * capacity)
    latest = max(late) * 1000
    text = f"{latest:.0f} ms, of {len(late)}; {refused} refused"
    show("  latest answer beyond its deadline", text, "50 ms", latest <= 50)
    show("  memory grew", f"{grown / 1024:.1f} MB", "bounded", grown < 64 * 1024)


def poured(folder, rate, seconds, deadline_s=0.2):
    """So many requests a second, whatever becomes of them: answers in time a second, how late each was, refusals."""
    payload = Tensor.pack(bright(0, 1), "uint8")
    late, good, refused, sent_at = [], 0, 0, {}
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            dealer.setsockopt(option, 0)
        dealer.connect(address_of(folder, "attic"))
        began, number = time.monotonic(), itertools.count(1)
        while (now := time.monotonic()) < began + seconds + 1:
            due = int(min(now - began, seconds) * rate) - len(sent_at)
            for _ in range(min(due, 200)):
                n = next(number)
                sent_at[n] = time.monotonic()
                dealer.send_multipart(encode(Infer(n, 0, int(deadline_s * 1000), payload)))
            while dealer.poll(1 if due <= 0 else 0):
                reply = decode(dealer.recv_multipart())
                took = time.monotonic() - sent_at[reply.request]
                if type(reply).__name__ == "Result":
                    good += took <= deadline_s
                    late.append(took - deadline_s)
                else:
                    refused += 1
    return good / seconds, late, refused


def hostile(folder, count=1_000_000):
    """Random and mutated frames into a live node."""
    rng = np.random.default_rng(0)
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
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
                """Whether a Ping is answered, when everything before it has been read."""
                dealer.send_multipart(ping)
                while dealer.poll(200):
                    if decode(dealer.recv_multipart()) == Pong(2**40):
                        return True
                return False

            until(answered, 60)
        grown = memory_kb(process) - before
        with fleet.client("attic") as client:
            until(lambda: client.status()["under_way"] == 0)
            counts = client.status()["counts"]
            must(client.infer(bright(0)).rows[0].experts == (0,), "hostile: the node does not answer any more")
        must("bugs" not in counts, "hostile: a message made a bug show")
    text = f"{counts['messages_malformed']:,} refused; memory grew {grown / 1024:.1f} MB"
    show(f"{count:,} random and mutated messages", text, "10 MB, no crash", grown < 10 * 1024)


def trickle(folder):
    """Somebody connects and sends a byte a second: when is he cut off, and does anybody else notice?"""
    host, port = address_of(folder, "attic").removeprefix("tcp://").split(":")
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        with Load(fleet, "attic") as load:
            time.sleep(5)
            at = time.monotonic()
            before = load.rate(at - 4, at)
            with socket.create_connection((host, int(port))) as slow:
                slow.settimeout(1)
                with suppress(OSError):
                    for _ in range(64):
                        slow.sendall(b"\xff")
                        with suppress(TimeoutError):
                            if not slow.recv(4096):
                                break
                cut = time.monotonic() - at
            time.sleep(4)
            after = load.rate(at + cut, at + cut + 4)
            share = load.rate(at, at + cut) / statistics.mean((before, after))
    show(
        "a byte a second: cut off after",
        f"{cut:.0f} s; others at {share:.0%} of their rate",
        "others at 90 %",
        share > 0.9,
    )
    must(load.sound and cut < 30, f"trickle: {load.summary()}, {cut:.0f} s")


def reloads(folder, times=100):
    """A new bundle again and again, under load."""
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        with Load(fleet, "attic") as load, fleet.client("attic") as client:
            for target in itertools.islice(itertools.cycle(("pi", "x86")), times):
                bundle = read_bundle(folder / "attic")
                changed = write_bundle(folder / "attic", replace(bundle.manifest, target=target), bundle.contents)
                pinned(folder, changed)
                fleet.signal("attic", signal.SIGHUP)
                until(lambda changed=changed: client.status()["bundle"] == changed.manifest.digest)
    failed = load.unanswered + load.wrong + len(load.refused)
    show(f"{times} reloads under load", f"{len(load.done):,} requests, {failed} failed", "0 failed", not failed)
    must(not failed, f"reloads: {load.refused[:2]}")


def requests(folder, count=1_000_000):
    """Very many requests: descriptors and memory before and after. The second half is compared with the first."""
    with Processes(folder) as fleet:
        fleet.acquainted("attic")
        process, seen = fleet.running["attic"], []
        images = bright(*[0, 1, 2] * 10)
        with fleet.client("attic") as client:
            step = max(1, count // 20 // len(images)) * len(images)
            for done in range(0, count, len(images)):
                if done % step == 0:
                    seen.append((memory_kb(process), descriptors(process)))
                must(all(row.experts for row in client.infer(images, 5.0).rows), "requests: a row unanswered")
        seen.append((memory_kb(process), descriptors(process)))
    half = seen[len(seen) // 2]
    grown, opened = seen[-1][0] - half[0], seen[-1][1] - half[1]
    text = f"second half: {grown / 1024:+.1f} MB, {opened:+d} descriptors; {seen[-1][0] / 1024:.0f} MB in all"
    show(f"{count:,} rows", text, "flat", grown < 2048 and opened <= 0)


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
    """Those that are named, or all."""
    if any(name.partition("=")[0] not in FAULTS for name in chosen):
        sys.exit(f"{__doc__}\nFAULT: {', '.join(FAULTS)}; a number of times, of seconds: killed=5")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended
    for name in chosen or FAULTS:
        fault, _, count = name.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            settle = settled(
                TESTS / "tiny" / "fleet", Path(folder) / "fleet", keyed=fault not in ("overload", "hostile")
            )
            FAULTS[fault](settle, *([int(count)] if count else []))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
