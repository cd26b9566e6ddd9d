"""Every socket of a device: one that others connect to, one to each peer. Beside the client, and keys for
making a pair, nobody else imports zmq.

One thread calls everything here but `wake`. Messages go in and come out; what is no message is counted, refused where
it can be, and goes no further. Nobody is trusted before CURVE has told who it is: the list of keys is set before the
socket is bound, and without keys nothing but loopback is bound.
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
from nmoe_edge.frames import receive_frames, send_frames, waiting
from nmoe_edge.keys import KeyPair
from nmoe_edge.protocol.messages import Message, Reason, Refuse, detail_of
from nmoe_edge.protocol.wire import DEFAULT_CAPS, Caps, decode, encode, glance

_MOST_COME, _MOST_GO = 64, 1024
"""Messages that libzmq keeps for one connection. What comes beyond them makes TCP slow the sender down; what goes must
be more than a device answers in one turn, since what finds no place is lost."""
_MOST_SOCKETS = 4096
_OTHERS_S = 0.002
"""The longest that a socket with messages keeps us from the others."""
_TURN_S = 0.02
"""How long messages are taken off one socket before others are looked at."""
_HANDSHAKE_MS = 5000
_HEARTBEAT_MS, _HEARTBEAT_LOST_MS = 5000, 15000
"""So that a host that lost its power frees what it held here."""
_RECONNECT_MS, _RECONNECT_MOST_MS = 50, 500
_REJECTED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH


Sender = zmq.Frame
"""Who sent a message to our own socket, and so where a reply goes: the frame that libzmq put before it."""
Heard = tuple[Message | None, int | None, Sender | None, int]
"""A message, or None and the request's number of what was none, where so much could be read; and from where: somebody
who asks us, or else the peer with this expert, whom we asked."""


class Sockets:
    """All of a device's."""

    def __init__(
        self,
        listen: str | None,
        keys: KeyPair | None,
        allowed: Mapping[str, str],
        counts: Metrics,
        log: Log,
        caps: Caps = DEFAULT_CAPS,
    ) -> None:
        """listen: where others connect, None for nowhere; allowed: public key -> device."""
        if listen is not None and port_of(listen) is None:
            raise NetworkError(f"{listen}: tcp://HOST:PORT is due, with a port in 1..65535, or 0 for any")
        if listen is not None and keys is None and not is_loopback(listen):
            raise NetworkError(
                f"{listen} is not loopback, and without keys nothing else will do; nmoe-edge keygen makes keys"
            )
        self._allowed, self._revoked = dict(allowed), False
        self._keys, self._counts, self._log, self._caps = keys, counts, log, caps
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MOST_SOCKETS)
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._experts: dict[zmq.Socket[bytes], int] = {}
        self._descriptors, self._by_descriptor = select.poll(), dict[int, zmq.Socket[bytes]]()
        self._touched: set[zmq.Socket[bytes]] = set()
        """Whose descriptors need not show that something waits, since something was done with them."""
        self._ready: list[tuple[Any, int]] = []
        self._others_at = 0.0
        self.least_budget_ms = 0.0
        """A request with less is refused at a glance: where there are too many, refusing must cost next to nothing."""
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._descriptors.register(self._woken, select.POLLIN)
        try:
            self._guard = self._listening(zmq.REP, "inproc://zeromq.zap.01")  # before anything that it guards
            self._server = self._listening(zmq.ROUTER, listen or "inproc://nowhere")
            self._watch = self._server.get_monitor_socket(_REJECTED)
            self._regard(self._watch)
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
        return self._allowed.get(_key_of(sender), "") if self.guarded else None

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
        if self._keys is None and not is_loopback(device.address):
            raise NetworkError(f"{device.name}: {device.address} is not loopback, and there are no keys here")
        self.disconnect(expert)
        try:
            peer = self._made(zmq.DEALER)
        except zmq.ZMQError as error:
            raise NetworkError(f"{device.name}: no socket for it: {error.strerror or error}") from error
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
        self._peers[expert], self._experts[peer] = peer, expert
        self._regard(peer)

    def disconnect(self, expert: int) -> None:
        """Let go of a peer."""
        peer = self._peers.pop(expert, None)
        if peer is not None:
            descriptor = int(peer.getsockopt(zmq.FD))
            self._descriptors.unregister(descriptor)
            del self._by_descriptor[descriptor], self._experts[peer]
            self._touched.discard(peer)
            peer.close(0)

    def send(self, expert: int, message: Message) -> bool:
        """Say something to a peer; False when there is no way to it at present."""
        peer = self._peers.get(expert)
        if peer is None:
            return False
        self._touched.add(peer)
        return send_frames(peer, encode(message))

    def reply(self, sender: Sender, message: Message) -> bool:
        """Say something to whoever asked; False when nobody is there any more."""
        self._touched.add(self._server)
        if send_frames(self._server, (sender.bytes, *encode(message))):
            return True
        self._counts.events["replies that nobody took"] += 1
        return False

    def wait(self, seconds: float) -> float:
        """Until something has come, somebody wakes us, or so many seconds are over; the moment at which it ended."""
        self._ready = self._waiting()
        now = time.monotonic()
        if self._ready and now < self._others_at:
            return now
        # Now and then also when something waits already: a socket that is never empty must not hide the others.
        came = self._descriptors.poll(0 if self._ready else max(0, int(seconds * 1000 + 0.999)))
        if came:
            self._touched.update(source for source, _ in self._ready)
            for descriptor, _ in came:
                source = self._by_descriptor.get(descriptor)
                if source is None:
                    self._woken.recv(4096)
                else:
                    self._touched.add(source)
            self._ready = self._waiting()
        now = time.monotonic()
        self._others_at = now + _OTHERS_S
        return now

    def heard(self) -> list[Heard]:
        """What had come when `wait` ended, and what came meanwhile."""
        heard: list[Heard] = []
        for source, _ in self._ready:
            self._touched.add(source)
            if source is self._guard:
                self._admit()
            elif source is self._watch:
                self._rejected()
            else:
                self._take(source, heard)
        return heard

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
            (zmq.RCVHWM, _MOST_COME),
            (zmq.SNDHWM, _MOST_GO),
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
            hint = "; is it served already?" if error.errno == errno.EADDRINUSE else ""
            raise NetworkError(f"{address}: {error.strerror or error}{hint}") from error
        self._regard(made)
        return made

    def _regard(self, source: zmq.Socket[bytes]) -> None:
        """Have `wait` look at it from now on."""
        descriptor = int(source.getsockopt(zmq.FD))
        self._descriptors.register(descriptor, select.POLLIN)
        self._by_descriptor[descriptor] = source
        self._touched.add(source)

    def _waiting(self) -> list[tuple[Any, int]]:
        """Those touched sockets that have messages; the descriptors of the others can be trusted again."""
        if not self._touched:
            return []
        touched, self._touched = self._touched, set()
        return waiting(touched)

    def _take(self, source: zmq.Socket[bytes], heard: list[Heard]) -> None:
        """The messages of one socket; of our own the first frame says who sent it."""
        ours, expert = source is self._server, self._experts.get(source, -1)
        until = time.monotonic() + _TURN_S
        while True:
            first, frames = receive_frames(source)
            sender = first if ours else None
            if not ours:
                frames.insert(0, first.bytes)
            if sender is not None and self._revoked and self.guarded and _key_of(sender) not in self._allowed:
                self._counts.events["unknown keys"] += 1
            elif sender is None or not (self.least_budget_ms and self._turned_away(frames, sender)):
                heard.append(self._decoded(frames, sender, expert))
            if not waiting((source,)) or time.monotonic() > until:
                return

    def _turned_away(self, frames: list[bytes], sender: Sender) -> bool:
        """Whether it was a request for which there is no time."""
        request, budget_ms = glance(frames) or (0, 0)
        if not request or budget_ms >= self.least_budget_ms:
            return False
        self._counts.events["requests refused busy"] += 1
        self.reply(sender, Refuse(request, Reason.BUSY))
        return True

    def _decoded(self, frames: list[bytes], sender: Sender | None, expert: int) -> Heard:
        try:
            return decode(frames, self._caps), None, sender, expert
        except RemoteProtocolError as error:
            self._counts.events["malformed messages"] += 1
            self._log.rarely("malformed", str(error)[:200])
            if sender is not None and error.request is not None:
                self.reply(sender, Refuse(error.request, Reason.BAD_REQUEST, detail_of(str(error))))
            return None, error.request, sender, expert

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


def _key_of(sender: Sender) -> str:
    """The public key that it came in with; empty without keys."""
    try:
        return str(sender.get("User-Id"))
    except zmq.ZMQError:
        return ""
