"""Questions to a device over the wire, and how long its answers took: a peer's expert, or the whole fleet.

One thread sends and receives, so that nothing of ours waits for a turn. With `clients` so many questions are under way
at any time. With `arrivals` a question is due at its moment whether or not the last was answered, and its time counts
from that moment: a device that stalls is charged for everybody who would have waited.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from numpy.typing import NDArray

from nmoe_edge.bench.board import Meter
from nmoe_edge.bench.samples import BLOCK_S, MOST_SAMPLES, settle
from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.client import Line, refusal
from nmoe_edge.errors import BenchError
from nmoe_edge.protocol.messages import Answer, Ask, Hello, Infer, Message, Refuse, Result, Welcome
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import encode

BUDGET_S = 1.0
"""What a question gives a device, as nmoe-edge infer does."""
_GIVEN_UP_NS = 1_250_000_000
"""After it was sent, the budget and the way there and back; not sent at all so long after it was due."""
_CONNECT_S, _FULL_S = 3.0, 0.05
"""The longest that a way to the device is waited for: at first, and when it takes no more."""
_LOOK_NS = 100_000_000
"""The longest between two looks at what is to be given up."""

Question = Callable[[int], Message]
"""A request's number -> what is asked."""


@dataclass(slots=True)
class Drive:
    """What a while of questions brought."""

    took_ns: array[int] = field(default_factory=lambda: array("q"))
    asked: int = 0
    refused: int = 0
    unanswered: int = 0
    unsent: int = 0
    """Of these."""
    rows: int = 0
    at_home: int = 0
    degraded: int = 0
    answer: Message | None = None
    """The last one."""
    refusal: str = ""
    """The last one, for a person."""


def drive(
    line: Line,
    question: Question,
    numbers: Iterator[int],
    seconds: float,
    *,
    clients: int = 0,
    arrivals: Iterator[float] | None = None,
    own: int = -1,
    meter: Meter | None = None,
) -> Drive:
    """Ask for so many seconds, then wait for what is under way; arrivals: seconds from now, growing."""
    found, clock = Drive(), time.monotonic_ns
    under_way: dict[int, tuple[int, int]] = {}  # number -> when it was due, when it was sent
    began = clock()
    until = began + int(seconds * 1e9)

    def moment() -> int:
        return until if arrivals is None else began + int(next(arrivals) * 1e9)

    def ask(due: int, now: int) -> None:
        number, late = next(numbers), now - due > _GIVEN_UP_NS
        sent = not late and line.send(question(number), _FULL_S if found.asked else _CONNECT_S)
        if not sent and not found.asked:
            raise BenchError(f"{line.address}: no way there for {_CONNECT_S:.0f} s; is it serving?")
        found.asked += 1
        if sent:
            under_way[number] = (due, clock())
        else:
            found.unanswered += 1
            found.unsent += 1

    due = moment()
    while True:
        now = clock()
        if meter is not None:
            meter.tick(now)
        while under_way and now - next(iter(under_way.values()))[1] > _GIVEN_UP_NS:
            del under_way[next(iter(under_way))]
            found.unanswered += 1
        # Who comes by chance is asked for also when we are behind; clients stop in time.
        asking = (now < until if arrivals is None else due < until) and found.asked < MOST_SAMPLES
        wake = now  # what came meanwhile is taken before the next goes out
        if asking and len(under_way) < clients:
            ask(now, now)
        elif asking and arrivals is not None and due <= now:
            ask(due, now)
            due = moment()
        elif asking or under_way:
            wake = min(due, now + _LOOK_NS) if asking else now + _LOOK_NS
        else:
            return found
        reply = line.receive((wake - now) / 1e9)
        if reply is not None:
            _take(found, reply, under_way.pop(getattr(reply, "request", -1), None), own)


def _take(found: Drive, reply: Message, asked: tuple[int, int] | None, own: int) -> None:
    """Count a reply; one to nothing that is under way was given up."""
    if asked is None:
        return
    if isinstance(reply, Refuse):
        found.refused += 1
        found.refusal = refusal(reply)
    elif isinstance(reply, Answer | Result):
        outputs = reply.outputs.unpack()
        found.took_ns.append(time.monotonic_ns() - asked[0])
        found.answer = reply
        found.rows += len(outputs)
        if isinstance(reply, Result):
            degraded = sum(row.degraded for row in reply.rows)
            found.degraded += degraded
            found.at_home += sum(row.experts == (own,) and not row.degraded for row in reply.rows)


def settled(line: Line, question: Question, numbers: Iterator[int], clients: int) -> bool:
    """Ask until the answers take alike; BenchError when there are none."""

    def block() -> array[int]:
        found = drive(line, question, numbers, BLOCK_S, clients=clients)
        if not found.took_ns:
            raise BenchError(f"{line.address}: {found.refusal or 'no answer in time; is it still serving?'}")
        return found.took_ns

    return settle(block, time.monotonic)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Moments at which strangers come, `rate` of them a second; the same for the same seed."""
    draw, at = Random(seed), 0.0  # noqa: S311  # chance, not secrets
    while True:
        at += draw.expovariate(rate)
        yield at


def greet(line: Line, manifest: Manifest) -> Welcome:
    """Introduce this bundle's device to a peer; BenchError where it is not welcome."""
    hello = Hello(manifest.device, manifest.expert, manifest.trunk_bytes, (), bundle=manifest.digest)
    reply = line.receive(_CONNECT_S) if line.send(hello, _CONNECT_S) else None
    if isinstance(reply, Refuse):
        raise BenchError(f"{line.address}: {manifest.device} is not welcome: {refusal(reply)}")
    if not isinstance(reply, Welcome):
        said = "no answer" if reply is None else f"a {type(reply).__name__}"
        raise BenchError(f"{line.address}: {said} to our Hello; is a device serving there, and does it know this key?")
    return reply


def asking(latents: NDArray[Any], dtype: str, rows: int, expert: int, trunk: bytes) -> Question:
    """Asks for a remote expert, so many rows each of these latents, which are cycled. latents: (n, latent)"""
    fed = [latents.take(range(i, i + rows), axis=0, mode="wrap") for i in range(len(latents))]

    def question(number: int) -> Ask:
        packed = Tensor.pack(fed[number % len(fed)], dtype)
        return Ask(number, 0, int(BUDGET_S * 1000), expert, trunk, packed)

    return question


def inferring(inputs: NDArray[Any]) -> Question:
    """Infers of one row each of these inputs, which are cycled."""

    def question(number: int) -> Infer:
        at = number % len(inputs)
        return Infer(number, 0, int(BUDGET_S * 1000), Tensor.pack(inputs[at : at + 1], inputs.dtype.name))

    return question


def message_bytes(message: Message) -> int:
    """Header and payload, without what ZeroMQ and CURVE add."""
    return sum(map(len, encode(message)))
