"""The other devices of the fleet: which of them are reachable and healthy.

`tick` pings peers that are alive and probes the others; a probe is a Hello. The replies change which peers are alive,
and `tick` reports the experts that were lost, so that requests stop waiting for them. Whether a peer is worth asking is
decided in protocol/health.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from nmoe_edge.bundle.fleet import Device, is_loopback, port_of
from nmoe_edge.common.log import Log
from nmoe_edge.device.dns import is_numeric
from nmoe_edge.device.metrics import Metrics, milliseconds
from nmoe_edge.device.sockets import Sender, Sockets
from nmoe_edge.errors import NetworkError
from nmoe_edge.protocol.health import Failure, Health
from nmoe_edge.protocol.messages import (
    PROTOCOL,
    Answer,
    Ask,
    Hello,
    Leave,
    Message,
    Ping,
    Pong,
    Reason,
    Refuse,
    Welcome,
)
from nmoe_edge.status import PeerReport

_MIN_PING_S = 0.5
"""A quiet peer is pinged this often in a small fleet."""
_PING_S_PER_PEER = 0.1
"""In a large fleet pings are rarer, so that their total stays at ten a second."""
_PROBES_PER_ADDRESS = 8
"""Unanswered probes at one address before another is tried."""


@dataclass(slots=True)
class _Peer:
    device: Device
    health: Health
    fleet_address: str
    """The address in fleet.toml, in numbers; empty until its host name is resolved."""
    discovered_address: str = ""
    """The address that mDNS names."""
    current_address: str = ""
    """Which of the two is in use."""
    probes: int = 0
    """Probes since it was alive or its address changed."""
    bundle: str = ""
    """Digest of the bundle that its Welcome names."""
    asked: int = 0
    answered: int = 0
    refused: int = 0


class Peers:
    """The peers of this device, by the number of their expert."""

    def __init__(
        self,
        hello: Callable[[], Hello],
        sockets: Sockets,
        numbers: Iterator[int],
        metrics: Metrics,
        log: Log,
        look_up: Callable[[Device], None],
    ) -> None:
        """hello: makes this device's greeting; look_up: starts to resolve a host name, see `resolved`."""
        self._hello = hello
        self._sockets = sockets
        self._numbers = numbers
        self._metrics = metrics
        self._log = log
        self._look_up = look_up
        self._peers: dict[int, _Peer] = {}
        self._lost: list[int] = []
        """Experts that the next `tick` reports as lost."""
        self._left_until: dict[int, float] = {}
        """For peers that said goodbye: the time until which they may still answer earlier Asks."""
        self.wake_at = 0.0
        """When `tick` must be called; sometimes too early, never too late."""

    def set_devices(self, devices: Collection[Device]) -> None:
        """Replace the set of peers. A peer with the same name, address and key keeps its connection."""
        wanted = {device.expert: device for device in devices}
        self.wake_at = 0.0
        ping_s = max(_MIN_PING_S, _PING_S_PER_PEER * len(wanted))
        removed = [expert for expert in self._peers if expert not in wanted]
        for expert in removed:
            del self._peers[expert]
            self._drop_connection(expert)
        for expert, device in wanted.items():
            known = self._peers.get(expert)
            if known is not None and _same_endpoint(known.device, device):
                known.device = device
                continue
            if known is not None:
                self._drop_connection(expert)
            peer = self._peers[expert] = _Peer(device, Health(random.random, ping_s), "")
            if is_numeric(device.address):
                peer.fleet_address = device.address
                self._connect(expert, peer, device.address)
            else:
                self._look_up(device)

    def resolved(self, device: Device, address: str) -> None:
        """The host name in the device's address stands for `address`. Ignored if fleet.toml has changed meanwhile."""
        peer = self._peers.get(device.expert)
        if peer is not None and _same_endpoint(peer.device, device) and peer.fleet_address != address:
            peer.fleet_address = address
            self._try_address(device.expert, peer, address)

    def discovered(self, name: str, address: str) -> None:
        """mDNS names this address for the device `name`. It is tried only while the peer is not alive elsewhere.

        mDNS is not authenticated, so a device without keys accepts loopback addresses only.
        """
        for expert, peer in self._peers.items():
            if peer.device.name != name or peer.current_address == address or not port_of(address):
                continue
            if not self._sockets.has_keys and not is_loopback(address):
                continue
            peer.discovered_address = address
            self._try_address(expert, peer, address)
            self._log.rarely("peer_found", address, peer=name)

    def trusted(self, now: float) -> frozenset[int]:
        """The experts that may be asked."""
        return frozenset([expert for expert, peer in self._peers.items() if peer.health.trusted(now)])

    def expected_s(self, expert: int) -> float:
        """Seconds that an answer of this expert usually takes; 0 while unknown."""
        peer = self._peers.get(expert)
        return 0.0 if peer is None or peer.health.rtt_s is None else peer.health.rtt_s

    def patience(self, expert: int) -> float:
        """Seconds after which another expert is asked as well."""
        peer = self._peers.get(expert)
        return float("inf") if peer is None else min(peer.health.p95_s, peer.health.doubt_s)

    def answer_used(self, expert: int) -> None:
        """The exchange could use an answer of this peer."""
        if expert in self._peers:
            self._peers[expert].health.answer_used()

    def ask(self, ask: Ask, now: float) -> bool:
        """Send an Ask. False when the peer is not alive or cannot be reached; it is lost then."""
        peer = self._peers.get(ask.expert)
        if peer is None or not peer.health.alive:
            return False
        if not self._sockets.send(ask.expert, ask):
            self.fail(ask.expert, "lost", now)
            return False
        peer.health.sent(ask.request, now)
        self.wake_at = min(self.wake_at, peer.health.wake_at)
        peer.asked += 1
        return True

    def fail(self, expert: int, why: Failure, now: float) -> None:
        """Stop asking this peer until a probe succeeds; the next `tick` reports its expert as lost."""
        peer = self._peers.get(expert)
        if peer is None:
            return
        self.wake_at = 0.0
        if peer.health.alive:
            self._metrics.counts[f"peers_{why}"] += 1
            self._log.rarely(f"peer_{why}", "not asked until it is back", peer=peer.device.name)
            self._lost.append(expert)
        peer.health.failed(why, now)

    def handle_reply(
        self, expert: int, message: Message | None, request: int | None, now: float
    ) -> Answer | Refuse | None:
        """Process a message that came over the connection to a peer.

        Returns what the requests must know: the Answer or Refuse to an Ask. message None: it could not be decoded;
        request: its number, where that could be read.
        """
        peer = self._peers.get(expert)
        if peer is None:
            return None
        if isinstance(message, Answer):
            peer.health.replied(message.request, now)
            peer.answered += 1
            return message
        if isinstance(message, Pong):
            peer.health.answered_ping(message.request, now)
            return None
        if isinstance(message, Welcome):
            self._handle_welcome(expert, peer, message, now)
            return None
        if isinstance(message, Refuse):
            return self._handle_refusal(expert, peer, message, now)
        # It could not be decoded, or a peer does not send messages of this kind.
        self.fail(expert, "wrong", now)
        return Refuse(request, Reason.FAILED) if request else None

    def handle_hello(self, hello: Hello, sender: Sender, now: float) -> Message:
        """The reply to a device that greets this one: a Welcome, or a Refuse that says what differs."""
        mine = self._hello()
        peer = self._peers.get(hello.expert)
        if hello.trunk != mine.trunk:
            return Refuse(0, Reason.WRONG_TRUNK, f"this device has trunk {mine.trunk.hex()}, yours {hello.trunk.hex()}")
        is_named_peer = peer is not None and peer.device.name == hello.device
        has_its_key = self._sockets.name_of(sender) in (None, hello.device)
        if peer is None or not is_named_peer or not has_its_key:
            return Refuse(0, Reason.BAD_REQUEST, "no device of this fleet: compare fleet.toml on both devices")
        if PROTOCOL not in hello.protocols:
            return Refuse(0, Reason.BAD_REQUEST, f"this device supports protocol {PROTOCOL} only")
        peer.health.contacted_us(now)
        self.wake_at = 0.0
        return Welcome(mine.device, mine.expert, mine.trunk, mine.capabilities, PROTOCOL, mine.bundle)

    def handle_leave(self, leave: Leave, sender: Sender, now: float) -> int | None:
        """The expert of a peer that says goodbye; None when its sender is not that peer."""
        for expert, peer in self._peers.items():
            if peer.device.name == leave.device and self._sockets.name_of(sender) in (None, leave.device):
                if peer.health.alive:
                    self._left_until[expert] = now + peer.health.silence_s
                    peer.health.failed("left", now)
                    self.wake_at = 0.0
                    self._metrics.counts["peers_left"] += 1
                return expert
        return None

    def tick(self, now: float) -> list[int]:
        """Send the probes and pings that are needed and give up on silent peers. Returns the experts lost since."""
        for expert, peer in self._peers.items():
            health = peer.health
            if health.is_overdue(now):
                self.fail(expert, "silent", now)
            action = health.next_message(now)
            if action == "probe":
                self._change_address_after_probes(expert, peer)
                if not self._sockets.send(expert, self._hello()):
                    health.probe_not_sent(now)
            elif action == "ping":
                number = next(self._numbers)
                if self._sockets.send(expert, Ping(number)):
                    health.sent(number, now, timed=False)
                else:
                    self.fail(expert, "lost", now)
        gone = [expert for expert, until in self._left_until.items() if now >= until]
        for expert in gone:
            del self._left_until[expert]
            self._lost.append(expert)
        wake_times = [peer.health.wake_at for peer in self._peers.values()]
        self.wake_at = min([*wake_times, *self._left_until.values()], default=float("inf"))
        lost, self._lost = self._lost, []
        return lost

    def say_goodbye(self, leave: Leave) -> None:
        """Send a Leave to every peer that can be reached."""
        for expert in self._peers:
            self._sockets.send(expert, leave)

    def report(self) -> list[PeerReport]:
        """The peers' part of a status report."""
        return [_peer_report(expert, peer) for expert, peer in sorted(self._peers.items())]

    def _connect(self, expert: int, peer: _Peer, address: str) -> None:
        peer.current_address = address
        peer.probes = 0
        self._sockets.connect(expert, replace(peer.device, address=address))

    def _drop_connection(self, expert: int) -> None:
        self._left_until.pop(expert, None)
        self._sockets.disconnect(expert)
        self._lost.append(expert)

    def _try_address(self, expert: int, peer: _Peer, address: str) -> None:
        """Connect to the peer at another address, unless it is alive at the current one."""
        if peer.health.alive or peer.current_address == address:
            return
        try:
            self._connect(expert, peer, address)
        except NetworkError as error:
            self._log.rarely("peer_unreachable", str(error), peer=peer.device.name)
        peer.health.contacted_us(0.0)
        self.wake_at = 0.0

    def _change_address_after_probes(self, expert: int, peer: _Peer) -> None:
        """After some unanswered probes, resolve the host name again and try the other known address."""
        peer.probes += 1
        if peer.probes % _PROBES_PER_ADDRESS == 0:
            if not is_numeric(peer.device.address):
                self._look_up(peer.device)
            is_at_fleet_address = peer.current_address == peer.fleet_address
            other = peer.discovered_address if is_at_fleet_address else peer.fleet_address
            if other:
                self._try_address(expert, peer, other)

    def _handle_welcome(self, expert: int, peer: _Peer, welcome: Welcome, now: float) -> None:
        mine = self._hello()
        is_this_peer = (welcome.device, welcome.expert) == (peer.device.name, expert)
        if not is_this_peer or welcome.trunk != mine.trunk:
            self.fail(expert, "foreign", now)
            answering = f"{welcome.device} answers there, with trunk {welcome.trunk.hex()}"
            self._log.rarely("peer_mismatch", answering, peer=peer.device.name)
            return
        was_alive = peer.health.alive
        peer.health.welcomed(now)
        self.wake_at = min(self.wake_at, peer.health.wake_at)
        if peer.health.alive and not was_alive:
            peer.bundle = welcome.bundle
            peer.probes = 0
            if self._left_until.pop(expert, None) is not None:  # it restarted and has forgotten earlier Asks
                self._lost.append(expert)
                self.wake_at = 0.0
            self._log.rarely("peer_alive", peer=peer.device.name)

    def _handle_refusal(self, expert: int, peer: _Peer, refuse: Refuse, now: float) -> Refuse | None:
        if refuse.request == 0:  # it refuses our Hello
            if refuse.reason == Reason.SHUTTING_DOWN:
                self.fail(expert, "left", now)
            else:
                self.fail(expert, "foreign", now)
                self._log.rarely("peer_refuses", refuse.detail, peer=peer.device.name)
            return None
        peer.health.replied(refuse.request, now, sound=False)
        peer.refused += 1
        if refuse.reason == Reason.WRONG_TRUNK:
            self.fail(expert, "foreign", now)
        elif refuse.reason == Reason.SHUTTING_DOWN:
            self.fail(expert, "left", now)
        return refuse


def _peer_report(expert: int, peer: _Peer) -> PeerReport:
    health = peer.health
    return {
        "name": peer.device.name,
        "expert": expert,
        "address": peer.current_address or peer.device.address,
        "state": health.state,
        "rtt_ms": milliseconds(health.rtt_s),
        "p95_ms": milliseconds(health.p95_s),
        "asked": peer.asked,
        "answered": peer.answered,
        "refused": peer.refused,
        "owed": health.owed,
        "bundle": peer.bundle[:12],
    }


def _same_endpoint(one: Device, other: Device) -> bool:
    """Whether a connection to `one` serves for `other` too."""
    return (one.name, one.address, one.public_key) == (other.name, other.address, other.public_key)
