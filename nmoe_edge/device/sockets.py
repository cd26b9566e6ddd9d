"""Every socket of a device: the server socket that others connect to, and one socket per peer.

One thread calls everything here except `wake`. Messages are encoded and decoded here: one that cannot be decoded is
counted, refused where its number could be read, and goes no further. Only this module, the client, frames and keys
import zmq.

CURVE authenticates others: the list of known keys is in force before the server socket is bound, and a device without
keys binds and connects to loopback only.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils import z85

from nmoe_edge.bundle.fleet import Device, is_loopback, port_of
from nmoe_edge.common.log import Log
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.errors import NetworkError, RemoteProtocolError
from nmoe_edge.frames import readable, receive_frames, send_frames
from nmoe_edge.keys import KeyPair
from nmoe_edge.protocol.messages import Message, Reason, Refuse, refusal_detail
from nmoe_edge.protocol.wire import DEFAULT_CAPS, Caps, decode, encode, peek_infer

_MAX_INCOMING = 64
"""Messages that libzmq queues for one connection before TCP slows the sender down."""
_MAX_OUTGOING = 1024
"""Messages that libzmq queues to one connection; more are lost. Keep the answers of one turn below this."""
_MAX_SOCKETS = 4096
_POLL_ALL_S = 0.002
"""All sockets are polled at least this often, even while some have messages."""
_SOCKET_TURN_S = 0.02
"""How long messages are taken from one socket before the next has its turn."""
_HANDSHAKE_MS = 5000
_HEARTBEAT_MS = 5000
_HEARTBEAT_TIMEOUT_MS = 15000
"""Frees what a connection holds here after its host has lost power."""
_RECONNECT_MS = 50
_MAX_RECONNECT_MS = 500
_HANDSHAKE_EVENTS = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_CLOSE_LINGER_MS = 200

Sender = zmq.Frame
"""Where a message to the server socket came from, and where its reply goes: the routing frame that libzmq adds."""
Received = tuple[Message | None, int | None, Sender | None, int]
"""One received message: (message, request, sender, expert).

message is None when it could not be decoded; request is then its number, where that could be read, else None.
sender is set for a message to the server socket; otherwise expert is the peer that it came from (else -1).
"""


class Sockets:
    """Every socket the device owns."""

    def __init__(
        self,
        listen: str | None,
        keys: KeyPair | None,
        allowed: Mapping[str, str],
        metrics: Metrics,
        log: Log,
        caps: Caps = DEFAULT_CAPS,
    ) -> None:
        """Bind the server socket; NetworkError when that is impossible, or not allowed without keys.

        listen: the address to bind, tcp://HOST:PORT with port 0 for any; None: accept no connections.
        keys: the device's own pair; None: no encryption. allowed: public key -> device name, of those that may connect.
        """
        if listen is not None and port_of(listen) is None:
            raise NetworkError(f"{listen}: expected tcp://HOST:PORT with a port in 1..65535, or 0 for any")
        if listen is not None and keys is None and not is_loopback(listen):
            raise NetworkError(
                f"{listen} is not loopback, and without keys a device serves loopback only; nmoe-edge keygen makes keys"
            )
        self._allowed = dict(allowed)
        self._any_key_revoked = False
        self._keys = keys
        self._metrics = metrics
        self._log = log
        self._caps = caps
        self.min_budget_ms = 0.0
        """A request with a smaller budget is refused before it is decoded: under overload refusing must be cheap."""

        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._experts: dict[zmq.Socket[bytes], int] = {}

        # A ZeroMQ descriptor signals only when the socket's state changes. So a socket that we have just used is
        # "touched": it must be asked for messages once before its descriptor can be trusted again.
        self._poll = select.poll()
        self._by_descriptor: dict[int, zmq.Socket[bytes]] = {}
        self._touched: set[zmq.Socket[bytes]] = set()
        self._ready: list[tuple[Any, int]] = []
        self._poll_all_at = 0.0

        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._poll.register(self._woken, select.POLLIN)
        try:
            self._authenticator = self._bind(zmq.REP, "inproc://zeromq.zap.01")  # before the socket that it protects
            self._server = self._bind(zmq.ROUTER, listen or "inproc://nowhere")
            self._monitor = self._server.get_monitor_socket(_HANDSHAKE_EVENTS)
            self._watch(self._monitor)
        except BaseException:
            self.close()
            raise

    @property
    def known_keys(self) -> int:
        """Number of keys that may connect."""
        return len(self._allowed)

    def allow(self, allowed: Mapping[str, str]) -> None:
        """Replace the known keys (public key -> device name). Messages from other keys are dropped from now on."""
        self._any_key_revoked |= bool(self._allowed.keys() - allowed.keys())
        self._allowed = dict(allowed)

    def name_of(self, sender: Sender) -> str | None:
        """The device that the sender's key belongs to, empty for an unknown key; None without keys."""
        return self._allowed.get(_key_of(sender), "") if self.has_keys else None

    @property
    def has_keys(self) -> bool:
        """Whether connections are encrypted and authenticated."""
        return self._keys is not None

    @property
    def address(self) -> str:
        """Where the server socket listens, with the actual port; empty when it does not."""
        address = self._server.getsockopt_string(zmq.LAST_ENDPOINT)
        return address if address.startswith("tcp:") else ""

    def connect(self, expert: int, device: Device) -> None:
        """Open a connection to a peer, in place of an earlier one. libzmq renews it whenever it is lost."""
        if self._keys is None and not is_loopback(device.address):
            raise NetworkError(f"{device.name}: {device.address} is not loopback, and this device has no keys")
        self.disconnect(expert)
        try:
            peer = self._new_socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise NetworkError(f"{device.name}: no socket for it: {error.strerror or error}") from error
        peer.setsockopt(zmq.IMMEDIATE, 1)  # an Ask that cannot leave now goes to another expert instead
        peer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        peer.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        if self._keys is not None and device.public_key is not None:
            peer.curve_publickey = self._keys.public.encode()
            peer.curve_secretkey = self._keys.secret.encode()
            peer.curve_serverkey = device.public_key.encode()
        peer.setsockopt(zmq.IPV6, "[" in device.address)
        try:
            peer.connect(device.address)
        except zmq.ZMQError as error:
            peer.close(0)
            raise NetworkError(f"{device.name}: {device.address}: {error.strerror or error}") from error
        self._peers[expert] = peer
        self._experts[peer] = expert
        self._watch(peer)

    def disconnect(self, expert: int) -> None:
        """Close the connection to a peer, if there is one."""
        peer = self._peers.pop(expert, None)
        if peer is not None:
            descriptor = int(peer.getsockopt(zmq.FD))
            self._poll.unregister(descriptor)
            del self._by_descriptor[descriptor]
            del self._experts[peer]
            self._touched.discard(peer)
            peer.close(0)

    def send(self, expert: int, message: Message) -> bool:
        """Send a message to a peer; False when it cannot be reached at present."""
        peer = self._peers.get(expert)
        if peer is None:
            return False
        self._touched.add(peer)
        return send_frames(peer, encode(message))

    def reply(self, sender: Sender, message: Message) -> bool:
        """Send a reply over the server socket; False when its receiver is gone."""
        self._touched.add(self._server)
        if send_frames(self._server, (sender.bytes, *encode(message))):
            return True
        self._metrics.counts["replies_undelivered"] += 1
        return False

    def wait(self, seconds: float) -> float:
        """Wait for a message, for `wake`, or until `seconds` have passed. Returns the time at which that happened."""
        self._ready = self._touched_with_messages()
        now = time.monotonic()
        if self._ready and now < self._poll_all_at:
            return now
        # Poll now and then even if messages are ready: a socket that is never empty must not hide the others.
        timeout_ms = 0 if self._ready else max(0, int(seconds * 1000 + 0.999))
        signalled = self._poll.poll(timeout_ms)
        if signalled:
            self._touched.update(source for source, _ in self._ready)
            for descriptor, _ in signalled:
                source = self._by_descriptor.get(descriptor)
                if source is None:
                    self._woken.recv(4096)
                else:
                    self._touched.add(source)
            self._ready = self._touched_with_messages()
        now = time.monotonic()
        self._poll_all_at = now + _POLL_ALL_S
        return now

    def receive(self) -> list[Received]:
        """The messages that were there when `wait` ended, and those that arrived since."""
        received: list[Received] = []
        for source, _ in self._ready:
            self._touched.add(source)
            if source is self._authenticator:
                self._authenticate()
            elif source is self._monitor:
                self._count_failed_handshake()
            else:
                self._take_messages(source, received)
        return received

    def wake(self) -> None:
        """End `wait`. Any thread may call this."""
        with suppress(OSError):  # enough wake-ups are queued already, or the socket is closed
            self._waker.send(b"!")

    def close(self) -> None:
        """Close every socket; messages already sent have 0.2 s to leave."""
        self._context.destroy(linger=_CLOSE_LINGER_MS)
        self._woken.close()
        self._waker.close()

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        new = self._context.socket(kind)
        options = {
            zmq.LINGER: 0,
            zmq.RCVHWM: _MAX_INCOMING,
            zmq.SNDHWM: _MAX_OUTGOING,
            zmq.MAXMSGSIZE: self._caps.payload_bytes,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
        }
        for option, value in options.items():
            new.setsockopt(option, value)
        return new

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        new = self._new_socket(kind)
        if kind == zmq.ROUTER:
            new.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a closed connection fails, so that we can count it
            if self._keys is not None:
                new.curve_server = True
                new.curve_secretkey = self._keys.secret.encode()
                new.zap_domain = b"nmoe"
        new.setsockopt(zmq.IPV6, "[" in address)
        try:
            new.bind(address)
        except zmq.ZMQError as error:
            new.close(0)
            hint = "; is it served already?" if error.errno == errno.EADDRINUSE else ""
            raise NetworkError(f"{address}: {error.strerror or error}{hint}") from error
        self._watch(new)
        return new

    def _watch(self, source: zmq.Socket[bytes]) -> None:
        """Make `wait` watch this socket."""
        descriptor = int(source.getsockopt(zmq.FD))
        self._poll.register(descriptor, select.POLLIN)
        self._by_descriptor[descriptor] = source
        self._touched.add(source)

    def _touched_with_messages(self) -> list[tuple[Any, int]]:
        """The touched sockets that have messages. The descriptors of the others can be trusted again."""
        if not self._touched:
            return []
        touched, self._touched = self._touched, set()
        return readable(touched)

    def _take_messages(self, source: zmq.Socket[bytes], received: list[Received]) -> None:
        """Append the messages of one socket; those of the server socket begin with the sender's frame."""
        from_server = source is self._server
        expert = self._experts.get(source, -1)
        until = time.monotonic() + _SOCKET_TURN_S
        while True:
            first, frames = receive_frames(source)
            sender = first if from_server else None
            if not from_server:
                frames.insert(0, first.bytes)
            if sender is not None and self._any_key_revoked and self.has_keys and _key_of(sender) not in self._allowed:
                self._metrics.counts["keys_unknown"] += 1
            elif sender is None or not (self.min_budget_ms and self._refuse_unread(frames, sender)):
                received.append(self._decode(frames, sender, expert))
            if not readable((source,)) or time.monotonic() > until:
                return

    def _refuse_unread(self, frames: list[bytes], sender: Sender) -> bool:
        """Refuse a request with too small a budget; False for every other message."""
        request, budget_ms = peek_infer(frames) or (0, 0)
        if not request or budget_ms >= self.min_budget_ms:
            return False
        self._metrics.counts["requests_refused_busy"] += 1
        self.reply(sender, Refuse(request, Reason.BUSY))
        return True

    def _decode(self, frames: list[bytes], sender: Sender | None, expert: int) -> Received:
        try:
            return decode(frames, self._caps), None, sender, expert
        except RemoteProtocolError as error:
            self._metrics.counts["messages_malformed"] += 1
            self._log.rarely("message_malformed", str(error)[:200])
            if sender is not None and error.request is not None:
                self.reply(sender, Refuse(error.request, Reason.BAD_REQUEST, refusal_detail(str(error))))
            return None, error.request, sender, expert

    def _authenticate(self) -> None:
        """Answer libzmq's question whether a key may connect (ZeroMQ RFC 27)."""
        version, number, _domain, address, _identity, mechanism, *keys = self._authenticator.recv_multipart()
        key = z85.encode(keys[0]).decode() if mechanism == b"CURVE" and keys else ""
        name = self._allowed.get(key)
        if name is None:
            self._metrics.counts["keys_unknown"] += 1
            self._log.rarely("key_unknown", f"from {address.decode(errors='replace')}")
        status = (b"200", b"OK", key.encode()) if name else (b"400", b"unknown key", b"")
        self._authenticator.send_multipart([version, number, *status, b""])

    def _count_failed_handshake(self) -> None:
        # zmq.utils.monitor would parse the event, but imports asyncio.
        (event,) = struct.unpack_from("=H", self._monitor.recv_multipart()[0])
        if event != zmq.Event.HANDSHAKE_FAILED_AUTH:  # `_authenticate` has counted that one as an unknown key
            self._metrics.counts["handshakes_failed"] += 1
            self._log.rarely("handshake_failed", "a connection without CURVE, or with another version of it")


def _key_of(sender: Sender) -> str:
    """The public key that the sender used; empty without keys."""
    try:
        return str(sender.get("User-Id"))
    except zmq.ZMQError:
        return ""
