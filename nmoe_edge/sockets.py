"""Every socket of a device: one that others connect to, one to each peer. Beside the client, and keys for
making a pair, nobody else imports zmq.

One thread calls everything here but `wake`. Messages go in and come out; what is no message is counted, refused where
it can be, and goes no further. Nobody is trusted before CURVE has told who it is: the list of keys is set before the
socket is bound, and without keys nothing but loopback is bound.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85

from nmoe_edge.counts import Counts
from nmoe_edge.errors import NetworkError, RemoteProtocolError
from nmoe_edge.fleet import Device, is_loopback
from nmoe_edge.keys import KeyPair
from nmoe_edge.log import Log
from nmoe_edge.protocol.messages import Message, Reason, Refuse
from nmoe_edge.protocol.wire import DEFAULT_CAPS, Caps, decode, encode

_MOST_QUEUED = 64
"""Messages that libzmq keeps for one connection, either way; beyond them TCP slows the sender down."""
_TURN_S = 0.02
"""How long messages are taken off one socket before others are looked at."""
_HANDSHAKE_MS = 5000
_HEARTBEAT_MS, _HEARTBEAT_LOST_MS = 5000, 15000
"""So that a host that lost its power frees what it held here."""
_RECONNECT_MS, _RECONNECT_MOST_MS = 50, 500
_REJECTED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH


class Sender(NamedTuple):
    """Who sent a message to our own socket, and so where a reply goes."""

    route: bytes
    frame: zmq.Frame

    @property
    def key(self) -> str:
        """The public key that it came in with; empty without keys."""
        try:
            return str(self.frame.get("User-Id"))
        except zmq.ZMQError:
            return ""


class Heard(NamedTuple):
    """A message, and from where: a peer's expert that we asked, or somebody who asks us."""

    message: Message | None
    """None: what came was no message."""
    expert: int = -1
    sender: Sender | None = None
    request: int | None = None
    """Of what was no message, where so much could be read."""


class Sockets:
    """All of a device's."""

    def __init__(
        self,
        listen: str | None,
        keys: KeyPair | None,
        allowed: Mapping[str, str],
        counts: Counts,
        log: Log,
        caps: Caps = DEFAULT_CAPS,
    ) -> None:
        """listen: where others connect, None for nowhere; allowed: public key -> device."""
        if listen is not None and keys is None and not is_loopback(listen):
            raise NetworkError(
                f"{listen} is not loopback, and without keys nothing else will do; nmoe-edge keygen makes keys"
            )
        self._allowed, self._revoked = dict(allowed), False
        self._keys, self._counts, self._log, self._caps = keys, counts, log, caps
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._ready: list[tuple[Any, int]] = []
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._poller.register(self._woken, zmq.POLLIN)
        try:
            self._guard = self._listening(zmq.REP, "inproc://zeromq.zap.01")  # before anything that it guards
            self._server = self._listening(zmq.ROUTER, listen or "inproc://nowhere")
            self._watch = self._server.get_monitor_socket(_REJECTED)
            self._poller.register(self._watch, zmq.POLLIN)
        except BaseException:
            self.close()
            raise

    @property
    def known_keys(self) -> int:
        """How many may come in."""
        return len(self._allowed)

    def allow(self, allowed: Mapping[str, str]) -> None:
        """Let in these keys from now on, and listen no more to others that are in already."""
        self._revoked |= bool(self._allowed.keys() - allowed.keys())
        self._allowed = dict(allowed)

    def name_of(self, sender: Sender) -> str | None:
        """The device whose key a sender has; None without keys."""
        return self._allowed.get(sender.key, "") if self.guarded else None

    @property
    def guarded(self) -> bool:
        """Whether there are keys."""
        return self._keys is not None

    @property
    def address(self) -> str:
        """Where it listens: the port that was taken where none was named."""
        address = self._server.getsockopt_string(zmq.LAST_ENDPOINT)
        return address if address.startswith("tcp:") else ""

    def connect(self, expert: int, device: Device) -> None:
        """Keep a connection to this peer; libzmq makes it anew whenever it is lost."""
        self.disconnect(expert)
        peer = self._made(zmq.DEALER)
        peer.setsockopt(zmq.IMMEDIATE, 1)  # what cannot leave now is for another expert, not for later
        peer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        peer.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MOST_MS)
        if self._keys is not None and device.public_key is not None:
            peer.curve_publickey, peer.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
            peer.curve_serverkey = device.public_key.encode()
        peer.setsockopt(zmq.IPV6, "[" in device.address)
        try:
            peer.connect(device.address)
        except zmq.ZMQError as error:
            peer.close(0)
            raise NetworkError(f"{device.name}: {device.address}: {error.strerror or error}") from error
        self._peers[expert] = peer
        self._poller.register(peer, zmq.POLLIN)

    def disconnect(self, expert: int) -> None:
        """Let go of a peer."""
        peer = self._peers.pop(expert, None)
        if peer is not None:
            self._poller.unregister(peer)
            peer.close(0)

    def send(self, expert: int, message: Message) -> bool:
        """Say something to a peer; False when there is no way to it at present."""
        peer = self._peers.get(expert)
        return peer is not None and self._sent(peer, encode(message))

    def reply(self, sender: Sender, message: Message) -> bool:
        """Say something to whoever asked; False when nobody is there any more."""
        gone = not self._sent(self._server, (sender.route, *encode(message)))
        self._counts.events["replies that nobody took"] += gone
        return not gone

    def wait(self, seconds: float) -> float:
        """Until something has come, somebody wakes us, or so many seconds are over; the moment at which it ended."""
        self._ready = self._poller.poll(max(0, int(seconds * 1000 + 0.999)))
        return time.monotonic()

    def heard(self) -> Iterator[Heard]:
        """What had come when `wait` ended, and what came meanwhile."""
        for source, _ in self._ready:
            if source is self._server:
                yield from self._asked()
            elif source is self._guard:
                self._admit()
            elif source is self._watch:
                self._rejected()
            elif isinstance(source, zmq.Socket):
                yield from self._answered(source)
            else:
                self._woken.recv(4096)

    def wake(self) -> None:
        """End `wait`; any thread may."""
        with suppress(OSError):  # it is being woken already, or is closed
            self._waker.send(b"!")

    def close(self) -> None:
        """Let go of everything; what was said last has a moment to leave."""
        self._context.destroy(linger=200)
        self._woken.close()
        self._waker.close()

    def _made(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, _MOST_QUEUED),
            (zmq.SNDHWM, _MOST_QUEUED),
            (zmq.MAXMSGSIZE, self._caps.payload_bytes),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_LOST_MS),
        ):
            made.setsockopt(option, value)
        return made

    def _listening(self, kind: int, address: str) -> zmq.Socket[bytes]:
        made = self._made(kind)
        if kind == zmq.ROUTER:
            made.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply to nobody is counted
            if self._keys is not None:
                made.curve_server, made.curve_secretkey = True, self._keys.secret.encode()
                made.zap_domain = b"nmoe"
        made.setsockopt(zmq.IPV6, "[" in address)
        try:
            made.bind(address)
        except zmq.ZMQError as error:
            made.close(0)
            raise NetworkError(f"{address}: {error.strerror or error}") from error
        self._poller.register(made, zmq.POLLIN)
        return made

    def _asked(self) -> Iterator[Heard]:
        """From our own socket: its first frame says who sent it."""
        server, until = self._server, time.monotonic() + _TURN_S
        while time.monotonic() < until:
            first = server.recv(copy=False)
            sender = Sender(first.bytes, first)
            frames = server.recv_multipart() if first.more else []
            if self._revoked and self.guarded and sender.key not in self._allowed:
                self._counts.events["unknown keys"] += 1
                if not int(server.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    return
                continue
            message, request = self._decoded(frames)
            if message is None and request is not None:
                self.reply(sender, Refuse(request, Reason.BAD_REQUEST, "not understood"))
            yield Heard(message, -1, sender, request)
            if not int(server.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return

    def _answered(self, peer: zmq.Socket[bytes]) -> Iterator[Heard]:
        expert = next((number for number, known in self._peers.items() if known is peer), -1)
        until = time.monotonic() + _TURN_S
        while time.monotonic() < until:
            try:
                frames = peer.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:  # nothing more, or disconnected for what came just now
                return
            message, request = self._decoded(frames)
            yield Heard(message, expert=expert, request=request)

    def _decoded(self, frames: list[bytes]) -> tuple[Message | None, int | None]:
        try:
            return decode(frames, self._caps), None
        except RemoteProtocolError as error:
            self._counts.events["malformed messages"] += 1
            self._log.rarely("malformed", str(error)[:200])
            return None, error.request

    def _admit(self) -> None:
        """Answer libzmq's question whether a key may come in (RFC 27)."""
        version, number, _domain, address, _identity, mechanism, *keys = self._guard.recv_multipart()
        key = z85.encode(keys[0]).decode() if mechanism == b"CURVE" and keys else ""
        name = self._allowed.get(key)
        if name is None:
            self._counts.events["unknown keys"] += 1
            self._log.rarely("rejected", f"a key that is not in the fleet, from {address.decode(errors='replace')}")
        status = (b"200", b"OK", key.encode()) if name else (b"400", b"unknown key", b"")
        self._guard.send_multipart([version, number, *status, b""])

    def _rejected(self) -> None:
        (event,) = struct.unpack_from("=H", self._watch.recv_multipart()[0])  # zmq.utils.monitor brings asyncio along
        if event != zmq.Event.HANDSHAKE_FAILED_AUTH:  # an unknown key was counted by name
            self._counts.events["failed handshakes"] += 1
            self._log.rarely("rejected", "a connection that does not speak CURVE as we do")

    def _sent(self, by: zmq.Socket[bytes], frames: tuple[bytes, ...]) -> bool:
        try:
            by.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # nobody is there, or too much waits for them already
            return False
        return True
