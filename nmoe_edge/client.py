"""What an application uses: inputs to a device, answers back. Any thread may call it."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from nmoe_edge.errors import CallError, RemoteProtocolError
from nmoe_edge.frames import receive_frames, send_frames, waiting, writable
from nmoe_edge.keys import KeyPair
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.messages import Infer, Message, Reason, Refuse, Report, Result, RowAnswer, Status
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import Caps, decode, encode
from nmoe_edge.schema import parse_json

_CAPS = Caps(text_bytes=4 * 1024 * 1024)
"""The status of a thousand peers is long."""
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
        Reason.EXPIRED: "the deadline was over before the device could begin; give it more time",
        Reason.SHUTTING_DOWN: "the device is shutting down",
    }.get(refuse.reason, f"the device refuses: {refuse.reason.name.lower().replace('_', ' ')}")
    return what + (f": {refuse.detail}" if refuse.detail else "")


class Client:
    """A device, seen from an application beside it."""

    def __init__(self, address: str, keys: KeyPair | None = None, server_key: str | None = None) -> None:
        """address: tcp://HOST:PORT; keys: one's own pair, known to the device; server_key: the device's public one."""
        if (keys is None) != (server_key is None):
            raise CallError("keys come in twos: one's own pair, and the device's public key")
        self.address, self._keys, self._server_key = address, keys, server_key
        self._context = zmq.Context()
        self._idle: list[zmq.Socket[bytes]] = []
        self._lock = threading.Lock()
        self._lent, self._closed = 0, False
        self._numbers = itertools.count(secrets.randbits(60))

    def infer(self, inputs: NDArray[Any], deadline_s: float = 1.0) -> Answers:
        """What the fleet makes of these rows (rows, …); CallError when it refuses or nothing comes in time."""
        inputs = np.asarray(inputs)
        budget_ms = max(1, int(deadline_s * 1000))
        packed = Tensor.pack(inputs, inputs.dtype.name)
        if len(packed.data) > _CAPS.payload_bytes:
            raise CallError(f"{len(packed.data)} bytes of inputs are over {_CAPS.payload_bytes}; ask with fewer rows")
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
        for socket in idle:
            socket.close(0)
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
        with self._borrowed() as socket:
            frames = encode(message)
            sent = send_frames(socket, frames)
            if not sent and writable(socket, max(1, int(wait_s * 1000))):
                sent = send_frames(socket, frames)
            while sent and (left := until - time.monotonic()) > 0 and waiting((socket,), max(1, int(left * 1000))):
                first, rest = receive_frames(socket)
                try:
                    reply = decode([first.bytes, *rest], _CAPS)
                except RemoteProtocolError as error:
                    raise CallError(f"{self.address} does not speak as we do: {error}") from error
                if getattr(reply, "request", None) == number:
                    return reply
            raise CallError(
                f"{self.address}: no answer within {wait_s:.3g} s; is it serving, and does it know this key?"
            )

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[zmq.Socket[bytes]]:
        """A socket for one call; it goes back when the call went well."""
        socket = self._taken()
        well = False
        try:
            yield socket
            well = True
        finally:
            self._given_back(socket, well)

    def _taken(self) -> zmq.Socket[bytes]:
        with self._lock:
            if self._closed:
                raise CallError("the client is closed")
            socket = self._idle.pop() if self._idle else self._connected()
            self._lent += 1
            return socket

    def _given_back(self, socket: zmq.Socket[bytes], well: bool) -> None:
        with self._lock:
            self._lent -= 1
            if well and not self._closed:
                self._idle.append(socket)
                return
            socket.close(0)
            last = self._closed and not self._lent
        if last:
            self._context.term()

    def _connected(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # what cannot leave now is not kept for later
        socket.setsockopt(zmq.IPV6, "[" in self.address)
        if self._keys is not None and self._server_key is not None:
            socket.curve_publickey, socket.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
            socket.curve_serverkey = self._server_key.encode()
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise CallError(f"{self.address}: {error.strerror or error}; tcp://HOST:PORT is due") from error
        return socket
