"""Requests to a device over the wire, and their latency: to one peer's expert, or through the whole fleet.

One thread sends and receives, so no latency includes a wait for a thread of the benchmark. A closed loop keeps one
request per client open. An open loop sends at scheduled times, the Poisson arrivals, whether or not earlier requests
are answered; latency counts from the scheduled time, so a device that stalls is charged for every request it delays.
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
from nmoe_edge.bench.samples import BLOCK_S, MAX_SAMPLES, settle
from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.client import Connection, refusal
from nmoe_edge.errors import BenchError
from nmoe_edge.protocol.messages import Answer, Ask, Hello, Infer, Message, Refuse, Result, Welcome
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import encode

BUDGET_S = 1.0
"""Budget of each request, as in nmoe-edge infer."""
_GIVE_UP_NS = 1_250_000_000
"""A request counts as unanswered this long after it was sent: the budget and a round trip. One that is this far behind
its scheduled time is not sent."""
_CONNECT_S = 3.0
"""Longest wait to send the first request."""
_SEND_S = 0.05
"""Longest wait to send a later request while the connection takes no more."""
_CHECK_NS = 100_000_000
"""Longest time between two checks for requests to give up."""

MakeRequest = Callable[[int], Message]
"""Request number -> the message to send."""


@dataclass(slots=True)
class Drive:
    """What happened to the requests of one round."""

    took_ns: array[int] = field(default_factory=lambda: array("q"))
    asked: int = 0
    refused: int = 0
    unanswered: int = 0
    unsent: int = 0
    """Unanswered requests that were never sent."""
    rows: int = 0
    local_rows: int = 0
    """Rows answered locally, by the device's own expert."""
    degraded: int = 0
    answer: Message | None = None
    """The last answer."""
    refusal: str = ""
    """The last refusal, as text."""


@dataclass(slots=True)
class _Open:
    """A request that waits for its reply; times are on the monotonic clock."""

    scheduled_ns: int
    sent_ns: int


def drive(
    connection: Connection,
    request: MakeRequest,
    numbers: Iterator[int],
    seconds: float,
    *,
    clients: int = 0,
    arrivals: Iterator[float] | None = None,
    own: int = -1,
    meter: Meter | None = None,
) -> Drive:
    """Send requests for `seconds`, then wait for the open ones.

    clients: the closed loop's requests at a time; arrivals: the open loop's times in seconds from now, ascending.
    own: number of the device's own expert. BenchError if the first request cannot be sent.
    """
    found = Drive()
    clock = time.monotonic_ns
    open_requests: dict[int, _Open] = {}  # by request number, the oldest first
    began = clock()
    until = began + int(seconds * 1e9)

    def next_arrival() -> int:
        return until if arrivals is None else began + int(next(arrivals) * 1e9)

    def send(scheduled: int, now: int) -> None:
        number = next(numbers)
        too_late = now - scheduled > _GIVE_UP_NS
        sent = not too_late and connection.send(request(number), _SEND_S if found.asked else _CONNECT_S)
        if not sent and not found.asked:
            raise BenchError(f"{connection.address}: no connection within {_CONNECT_S:.0f} s; is the device serving?")
        found.asked += 1
        if sent:
            open_requests[number] = _Open(scheduled, clock())
        else:
            found.unanswered += 1
            found.unsent += 1

    arrival = next_arrival()
    while True:
        now = clock()
        if meter is not None:
            meter.tick(now)
        while open_requests and now - next(iter(open_requests.values())).sent_ns > _GIVE_UP_NS:
            del open_requests[next(iter(open_requests))]
            found.unanswered += 1
        # Every arrival that is scheduled before the end is sent, even if the benchmark is behind; clients stop in time.
        in_time = now < until if arrivals is None else arrival < until
        sending = in_time and found.asked < MAX_SAMPLES
        wake = now  # after a send, take the replies that are here before the next send
        if sending and len(open_requests) < clients:
            send(now, now)
        elif sending and arrivals is not None and arrival <= now:
            send(arrival, now)
            arrival = next_arrival()
        elif sending or open_requests:
            wake = min(arrival, now + _CHECK_NS) if sending else now + _CHECK_NS
        else:
            return found
        reply = connection.receive((wake - now) / 1e9)
        if reply is not None:
            _count(found, reply, open_requests.pop(getattr(reply, "request", -1), None), own)


def _count(found: Drive, reply: Message, asked: _Open | None, own: int) -> None:
    """Add a reply to the counts. asked: the request it answers, or None if that was given up."""
    if asked is None:
        return
    if isinstance(reply, Refuse):
        found.refused += 1
        found.refusal = refusal(reply)
    elif isinstance(reply, Answer | Result):
        outputs = reply.outputs.unpack()
        found.took_ns.append(time.monotonic_ns() - asked.scheduled_ns)
        found.answer = reply
        found.rows += len(outputs)
        if isinstance(reply, Result):
            found.degraded += sum(row.degraded for row in reply.rows)
            found.local_rows += sum(row.experts == (own,) and not row.degraded for row in reply.rows)


def warm_up(connection: Connection, request: MakeRequest, numbers: Iterator[int], clients: int) -> bool:
    """Warm up with requests and return whether their latency settled; BenchError if none is answered."""

    def block() -> array[int]:
        found = drive(connection, request, numbers, BLOCK_S, clients=clients)
        if not found.took_ns:
            reason = found.refusal or "no answer in time; is the device still serving?"
            raise BenchError(f"{connection.address}: {reason}")
        return found.took_ns

    return settle(block, time.monotonic)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Times of Poisson arrivals in seconds, `rate` per second on average; the same for the same seed."""
    random = Random(seed)  # noqa: S311  # a simulation, not a secret
    at = 0.0
    while True:
        at += random.expovariate(rate)
        yield at


def greet(connection: Connection, manifest: Manifest) -> Welcome:
    """Introduce this bundle's device to a peer with a Hello; BenchError if the peer does not welcome it."""
    hello = Hello(manifest.device, manifest.expert, manifest.trunk_bytes, (), bundle=manifest.digest)
    reply = connection.receive(_CONNECT_S) if connection.send(hello, _CONNECT_S) else None
    if isinstance(reply, Refuse):
        raise BenchError(f"{connection.address}: the peer refuses {manifest.device}: {refusal(reply)}")
    if not isinstance(reply, Welcome):
        received = "no answer" if reply is None else f"an unexpected {type(reply).__name__}"
        raise BenchError(
            f"{connection.address}: {received} to Hello; is a device serving there, and does it know this key?"
        )
    return reply


def make_asks(latents: NDArray[Any], dtype: str, rows: int, expert: int, trunk: bytes) -> MakeRequest:
    """Returns a function that makes Asks of a remote expert, each with the next `rows` latents, in a cycle.

    latents: (n, latent)
    """
    batches = [latents.take(range(i, i + rows), axis=0, mode="wrap") for i in range(len(latents))]

    def request(number: int) -> Ask:
        packed = Tensor.pack(batches[number % len(batches)], dtype)
        return Ask(number, 0, int(BUDGET_S * 1000), expert, trunk, packed)

    return request


def make_infers(inputs: NDArray[Any]) -> MakeRequest:
    """Returns a function that makes Infers of one row each, with the inputs in a cycle. inputs: (n, ...)"""

    def request(number: int) -> Infer:
        i = number % len(inputs)
        return Infer(number, 0, int(BUDGET_S * 1000), Tensor.pack(inputs[i : i + 1], inputs.dtype.name))

    return request


def message_bytes(message: Message) -> int:
    """Size of header and payload, without the framing of ZeroMQ and CURVE."""
    return sum(map(len, encode(message)))
