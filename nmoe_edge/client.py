"""What an application uses: inputs to a device, answers back. Any thread may call it.

Below it a Line, one connection and nothing more, for whoever keeps the time himself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from nmoe_edge.bundle.fleet import port_of
from nmoe_edge.common.schema import parse_json
from nmoe_edge.errors import CallError, RemoteProtocolError
from nmoe_edge.frames import receive_frames, send_frames, waiting, writable
from nmoe_edge.keys import KeyPair
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.messages import Infer, Message, Reason, Refuse, Report, Result, RowAnswer, Status
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import Caps, decode, encode

_CAPS = Caps(text_bytes=4 * 1024 * 1024)
"""The status of a thousand peers is long."""
_BARE = "? asked without keys, as no --fleet was given (or it has none); a device with keys does not answer that"
MOST_DEADLINE_S = 3600.0
_GRACE_S = 0.25
"""For the way there and back, beyond what the device may take."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a fleet made of inputs."""

    outputs: NDArray[np.float32]
    """(rows, outputs)"""
    rows: tuple[RowAnswer, ...]
    """How each came about."""
    elapsed_s: float
    """On the device that was asked."""

    def probabilities(self, combination: str, adapt: bool) -> NDArray[np.float32]:
        """The outputs as shares of one, under the rules that the device's status shows. (rows, outputs)"""
        done = adapt or combination == "probabilities"
        return self.outputs if done else np.asarray(softmax(self.outputs), np.float32)


def answers_of(reply: Message) -> Answers:
    """A Result's answers; CallError where it is a refusal."""
    if isinstance(reply, Refuse):
        raise CallError(refusal(reply))
    if not isinstance(reply, Result):
        raise CallError(f"the device answered with a {type(reply).__name__}")
    return Answers(reply.outputs.unpack(), reply.rows, reply.elapsed_us / 1e6)


def refusal(refuse: Refuse) -> str:
    """A Refuse as a line for a person."""
    what = {
        Reason.BUSY: "the device is busy: its queue is full for longer than this deadline; ask again later",
        Reason.EXPIRED: "the deadline was over first; give it more time",
        Reason.SHUTTING_DOWN: "the device is shutting down",
    }.get(refuse.reason, f"the device refuses: {refuse.reason.name.lower().replace('_', ' ')}")
    return what + (f": {refuse.detail}" if refuse.detail else "")


def budget_of(deadline_s: float) -> int:
    """A deadline in the milliseconds of a message."""
    if not 0 < deadline_s <= MOST_DEADLINE_S:  # so written, NaN is refused too
        raise CallError(f"a deadline of {deadline_s} s is not over 0 and at most {MOST_DEADLINE_S}")
    return max(1, int(deadline_s * 1000))


class Line:
    """A connection to a device, of one thread: messages out, messages in."""

    def __init__(
        self,
        address: str,
        keys: KeyPair | None = None,
        server_key: str | None = None,
        *,
        connections: int = 1,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Several connections take turns, as if as many clients asked; context: None: one of its own."""
        if not port_of(address):
            raise CallError(
                f"{address}: tcp://HOST:PORT is due, with a port in 1..65535, or with --fleet a device's name"
            )
        self.address = address
        self._context = zmq.Context() if context is None else context
        self._lent = context is not None
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what cannot leave now is not kept for later
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        if keys is not None and server_key is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            self._socket.curve_serverkey = server_key.encode()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        try:
            for _ in range(connections):
                self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise CallError(f"{address}: {error.strerror or error}") from error

    def send(self, message: Message, wait_s: float) -> bool:
        """False when there was no way to the device in all that time."""
        frames = encode(message)
        if send_frames(self._socket, frames):
            return True
        return writable(self._socket, max(1, int(wait_s * 1000))) and send_frames(self._socket, frames)

    def receive(self, wait_s: float) -> Message | None:
        """The next message; None when none comes in time. CallError where it is no message."""
        until = time.monotonic() + wait_s
        while not waiting((self._socket,)):
            left = until - time.monotonic()
            if left <= 0:
                return None
            try:
                select.select([self._descriptor], [], [], left)  # to the microsecond; libzmq's poll counts milliseconds
            except ValueError:  # a descriptor over 1023, which select does not know
                waiting((self._socket,), max(1, int(left * 1000)))
        first, rest = receive_frames(self._socket)
        try:
            return decode([first.bytes, *rest], _CAPS)
        except RemoteProtocolError as error:
            raise CallError(f"{self.address} does not speak as we do: {error}") from error

    def close(self) -> None:
        """Let go of the device."""
        self._socket.close(0)
        if not self._lent:
            self._context.term()


class Client:
    """A device, seen from an application beside it."""

    def __init__(self, address: str, keys: KeyPair | None = None, server_key: str | None = None) -> None:
        """address: tcp://HOST:PORT; keys: one's own pair, known to the device; server_key: the device's public one."""
        if (keys is None) != (server_key is None):
            raise CallError("keys come in twos: one's own pair, and the device's public key")
        self.address, self._keys, self._server_key = address, keys, server_key
        self._context = zmq.Context()
        self._idle: list[Line] = []
        self._lock = threading.Lock()
        self._lent, self._closed, self._process = 0, False, os.getpid()
        self._numbers = itertools.count(secrets.randbits(60))

    def infer(self, inputs: NDArray[Any], deadline_s: float = 1.0) -> Answers:
        """What the fleet makes of these rows (rows, …); CallError when it refuses or nothing comes in time."""
        inputs = np.asarray(inputs)
        budget_ms = budget_of(deadline_s)
        packed = Tensor.pack(inputs, inputs.dtype.name)
        if len(packed.data) > _CAPS.payload_bytes:
            raise CallError(f"{len(packed.data)} bytes of inputs are over {_CAPS.payload_bytes}; ask with fewer rows")
        if len(inputs) > _CAPS.rows:
            raise CallError(f"{len(inputs)} rows are over {_CAPS.rows}; ask with fewer")
        reply = self._call(lambda number: Infer(number, 0, budget_ms, packed), deadline_s + _GRACE_S)
        return answers_of(reply)

    def status(self, deadline_s: float = 2.0) -> dict[str, Any]:
        """What the device says of itself, its peers and its counts."""
        reply = self._call(Status, deadline_s)
        if isinstance(reply, Refuse):
            raise CallError(refusal(reply))
        facts = parse_json(reply.facts) if isinstance(reply, Report) else None
        if not isinstance(facts, dict):
            raise CallError(f"{self.address} answered a Status with a {type(reply).__name__}")
        return facts

    def close(self) -> None:
        """Let go of the device."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()
        if not self._lent:  # else whoever comes back last
            self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, question: Any, wait_s: float) -> Message:
        """Ask once and wait for the reply that carries the same number."""
        number = next(self._numbers)
        message = question(number)
        until = time.monotonic() + wait_s
        with self._borrowed() as line:
            line.send(message, wait_s)  # no way there in all that time: said below
            while (left := until - time.monotonic()) > 0 and (reply := line.receive(left)) is not None:
                if getattr(reply, "request", None) == number:
                    return reply
            why = ", and does it know this key?" if self._keys is not None else _BARE
            raise CallError(f"{self.address}: no answer within {wait_s:.3g} s; is it serving{why}")

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Line]:
        """A line for one call; it goes back when the call went well."""
        line = self._taken()
        well = False
        try:
            yield line
            well = True
        finally:
            self._given_back(line, well)

    def _taken(self) -> Line:
        if self._process != os.getpid():  # forked: libzmq's threads stayed behind, and closing would wait for them
            self._left_behind = self._context, self._idle
            self._context, self._idle, self._lock = zmq.Context(), [], threading.Lock()
            self._lent, self._process = 0, os.getpid()
        with self._lock:
            if self._closed:
                raise CallError("the client is closed")
            line = self._idle.pop() if self._idle else self._connected()
            self._lent += 1
            return line

    def _given_back(self, line: Line, well: bool) -> None:
        with self._lock:
            self._lent -= 1
            if well and not self._closed:
                self._idle.append(line)
                return
            line.close()
            last = self._closed and not self._lent
        if last:
            self._context.term()

    def _connected(self) -> Line:
        return Line(self.address, self._keys, self._server_key, context=self._context)
