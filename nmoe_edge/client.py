"""How an application asks a device: a Client sends inputs and returns answers. Any thread may call it.

    with Client("tcp://127.0.0.1:7101") as client:
        answers = client.infer(rows)

Below it, a Connection is for callers that keep track of time themselves. One thread at a time may use it.
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
from typing import Any, cast

import numpy as np
import zmq
from numpy.typing import NDArray

from nmoe_edge.bundle.fleet import port_of
from nmoe_edge.common.schema import parse_json
from nmoe_edge.errors import CallError, RemoteProtocolError
from nmoe_edge.frames import readable, receive_frames, send_frames, writable
from nmoe_edge.keys import KeyPair
from nmoe_edge.protocol.combine import softmax
from nmoe_edge.protocol.messages import Infer, Message, Reason, Refuse, Report, Result, RowAnswer, Status
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import Caps, decode, encode
from nmoe_edge.status import StatusReport

MAX_DEADLINE_S = 3600.0
_CAPS = Caps(text_bytes=4 * 1024 * 1024)
"""The status report of a thousand peers is long."""
_GRACE_S = 0.25
"""A client waits this much longer than the deadline, for the network."""
_NO_KEYS_HINT = "? If the device has keys, this client needs a key pair (nmoe-edge: --fleet)"


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers to the rows of one request.

        answers = client.infer(rows)
        answers.outputs.argmax(axis=1)          # the class of every row
        [row.degraded for row in answers.rows]  # whether a wanted expert is missing

    `Client.infer` and `Node.infer` return it.
    """

    outputs: NDArray[np.float32]
    """(rows, outputs): the combined outputs of the experts, in the order of the inputs."""
    rows: tuple[RowAnswer, ...]
    """For each row: the experts that answered, their weights, and the experts that are missing."""
    elapsed_s: float
    """Seconds from the request's arrival at the device to its answer."""

    def probabilities(self, combination: str, adapt: bool) -> NDArray[np.float32]:
        """The outputs as probabilities, (rows, outputs).

        combination, adapt: as in the device's status report, `combination` and `class_mix.adapt`. They say whether
        the outputs are probabilities already; if not, this is their softmax.

            status = client.status()
            p = answers.probabilities(status["combination"], status["class_mix"]["adapt"])
        """
        already = adapt or combination == "probabilities"
        return self.outputs if already else np.asarray(softmax(self.outputs), np.float32)


def answers_of(reply: Message) -> Answers:
    """The answers in a Result; CallError for any other message."""
    if isinstance(reply, Refuse):
        raise CallError(refusal(reply))
    if not isinstance(reply, Result):
        raise CallError(f"the device answered with a {type(reply).__name__}")
    return Answers(reply.outputs.unpack(), reply.rows, reply.elapsed_us / 1e6)


_REFUSALS = {
    Reason.BUSY: "the device is busy: its queue is full for longer than this deadline; ask again later",
    Reason.EXPIRED: "the deadline passed before the device could answer; give it more time",
    Reason.SHUTTING_DOWN: "the device is shutting down",
}


def refusal(refuse: Refuse) -> str:
    """A Refuse as one line for a person."""
    reason = refuse.reason.name.lower().replace("_", " ")
    text = _REFUSALS.get(refuse.reason, f"the device refuses: {reason}")
    return f"{text}: {refuse.detail}" if refuse.detail else text


def budget_of(deadline_s: float) -> int:
    """A deadline in whole milliseconds, at least 1; CallError unless it is over 0 and at most MAX_DEADLINE_S."""
    if not 0 < deadline_s <= MAX_DEADLINE_S:  # written so that NaN is refused too
        raise CallError(
            f"a deadline of {deadline_s} s is out of range: it must be over 0 and at most {MAX_DEADLINE_S} s"
        )
    return max(1, int(deadline_s * 1000))


class Connection:
    """Sends messages to a device and receives its replies. One thread at a time may use it."""

    def __init__(
        self,
        address: str,
        keys: KeyPair | None = None,
        server_key: str | None = None,
        *,
        connections: int = 1,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Connect to `address`, tcp://HOST:PORT; CallError when the address is malformed or no socket is available.

        keys, server_key: as for Client. connections: how many TCP connections take turns, as if as many clients
        asked. context: shared with the caller, who closes it; by default the connection has its own.
        """
        if not port_of(address):
            raise CallError(
                f"{address}: expected tcp://HOST:PORT with a port in 1..65535, or with --fleet a device's name"
            )
        self.address = address
        self._owns_context = context is None
        self._context = zmq.Context() if context is None else context
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # a message that cannot leave now is not kept for later
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        if keys is not None and server_key is not None:
            self._socket.curve_publickey = keys.public.encode()
            self._socket.curve_secretkey = keys.secret.encode()
            self._socket.curve_serverkey = server_key.encode()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        try:
            for _ in range(connections):
                self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise CallError(f"{address}: {error.strerror or error}") from error

    def send(self, message: Message, wait_s: float) -> bool:
        """Send a message; False when the device could not be reached within `wait_s` seconds."""
        frames = encode(message)
        if send_frames(self._socket, frames):
            return True
        return writable(self._socket, max(1, int(wait_s * 1000))) and send_frames(self._socket, frames)

    def receive(self, wait_s: float) -> Message | None:
        """The next message; None when none arrives within `wait_s` seconds. CallError when it cannot be decoded."""
        until = time.monotonic() + wait_s
        while not readable((self._socket,)):
            left = until - time.monotonic()
            if left <= 0:
                return None
            try:
                select.select([self._descriptor], [], [], left)  # exact to the microsecond; zmq_poll to the millisecond
            except ValueError:  # select does not accept descriptors over 1023
                readable((self._socket,), max(1, int(left * 1000)))
        first, rest = receive_frames(self._socket)
        try:
            return decode([first.bytes, *rest], _CAPS)
        except RemoteProtocolError as error:
            raise CallError(f"{self.address} sent a message that cannot be read: {error}") from error

    def close(self) -> None:
        self._socket.close(0)
        if self._owns_context:
            self._context.term()


class Client:
    """A device, as an application sees it. Any number of threads may share one client.

        with Client("tcp://127.0.0.1:7101") as client:
            answers = client.infer(images, deadline_s=0.5)
            print(answers.outputs.argmax(axis=1))

    For a fleet with keys, `nmoe_edge.keys.keys_to` finds them:

        Client(address, *keys_to(address, Path("fleet.toml"), None))
    """

    def __init__(self, address: str, keys: KeyPair | None = None, server_key: str | None = None) -> None:
        """Prepare to ask the device at `address`, tcp://HOST:PORT; it need not serve yet.

        keys: the key pair to use, which the device must know. server_key: the device's public key. Give both or
        neither, else CallError.
        """
        if (keys is None) != (server_key is None):
            raise CallError("keys come in twos: give your own key pair and the device's public key, or neither")
        self.address = address
        self._keys = keys
        self._server_key = server_key
        self._context = zmq.Context()
        self._idle: list[Connection] = []
        self._in_use = 0
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._numbers = itertools.count(secrets.randbits(60))

    def infer(self, inputs: NDArray[Any], deadline_s: float = 1.0) -> Answers:
        """The fleet's answers to these inputs.

        inputs: (rows, …), of the dtype and row shape in the status report's `input`; at most 4,096 rows and 32 MiB.
        deadline_s: seconds in which the device must answer, over 0 and at most 3600.

        Raises CallError when the device refuses or does not answer in time. A peer that fails is not an error: its
        rows are answered by other experts and marked as degraded.
        """
        inputs = np.asarray(inputs)
        budget_ms = budget_of(deadline_s)
        packed = Tensor.pack(inputs, inputs.dtype.name)
        if len(packed.data) > _CAPS.payload_bytes:
            raise CallError(f"{len(packed.data)} bytes of inputs are over {_CAPS.payload_bytes}; ask with fewer rows")
        if len(inputs) > _CAPS.rows:
            raise CallError(f"{len(inputs)} rows are over {_CAPS.rows}; ask with fewer")
        reply = self._call(lambda number: Infer(number, 0, budget_ms, packed), deadline_s + _GRACE_S)
        return answers_of(reply)

    def status(self, deadline_s: float = 2.0) -> StatusReport:
        """The device's report about itself, its peers and its counters; see `nmoe_edge.status`.

        deadline_s: seconds to wait. Raises CallError when no report arrives in time.

            client.status()["class_mix"]["rows"]
        """
        reply = self._call(Status, deadline_s)
        if isinstance(reply, Refuse):
            raise CallError(refusal(reply))
        report = parse_json(reply.facts) if isinstance(reply, Report) else None
        if not isinstance(report, dict):
            raise CallError(f"{self.address} answered a Status with a {type(reply).__name__}")
        return cast(StatusReport, report)

    def close(self) -> None:
        """Close all connections. Calls that other threads have under way still finish."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        if not self._in_use:  # otherwise the last call that finishes closes the context
            self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, question: Any, wait_s: float) -> Message:
        """Send one question and wait for the reply with its number. question: number -> message"""
        number = next(self._numbers)
        message = question(number)
        until = time.monotonic() + wait_s
        with self._borrow_connection() as connection:
            connection.send(message, wait_s)  # if the device cannot be reached, the error below says so
            while (left := until - time.monotonic()) > 0 and (reply := connection.receive(left)) is not None:
                if getattr(reply, "request", None) == number:
                    return reply
            hint = ", and does it know this key?" if self._keys is not None else _NO_KEYS_HINT
            raise CallError(f"{self.address}: no answer within {wait_s:.3g} s; is it serving{hint}")

    @contextlib.contextmanager
    def _borrow_connection(self) -> Iterator[Connection]:
        """A connection for one call. It is used again when the call succeeds, and closed otherwise."""
        connection = self._take_connection()
        succeeded = False
        try:
            yield connection
            succeeded = True
        finally:
            self._return_connection(connection, succeeded)

    def _take_connection(self) -> Connection:
        if self._process != os.getpid():
            # After a fork libzmq's threads are missing, and closing the parent's sockets would wait for them forever.
            # We keep a reference to them and start afresh.
            self._before_fork = self._context, self._idle
            self._context = zmq.Context()
            self._idle = []
            self._in_use = 0
            self._lock = threading.Lock()
            self._process = os.getpid()
        with self._lock:
            if self._closed:
                raise CallError("the client is closed")
            connection = self._idle.pop() if self._idle else self._new_connection()
            self._in_use += 1
            return connection

    def _return_connection(self, connection: Connection, succeeded: bool) -> None:
        with self._lock:
            self._in_use -= 1
            if succeeded and not self._closed:
                self._idle.append(connection)
                return
            connection.close()
            is_last = self._closed and not self._in_use
        if is_last:
            self._context.term()

    def _new_connection(self) -> Connection:
        return Connection(self.address, self._keys, self._server_key, context=self._context)
