"""The other devices of the fleet: who is there, who is worth asking, what is said to them to find out.

It greets, pings and probes by itself when `tick` is called; what comes of it changes who is `alive`. A peer that is
lost is told to whoever waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nmoe_edge.bundle.fleet import Device, is_loopback, port_of
from nmoe_edge.common.log import Log
from nmoe_edge.device.dns import is_numbers
from nmoe_edge.device.metrics import Metrics
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

_PING_S, _PING_A_PEER_S = 0.5, 0.1
"""A quiet peer is pinged so often; in a large fleet more rarely, so that pings stay a small work."""
_PROBES = 8
"""At one place, before another is tried."""


@dataclass(slots=True)
class _Peer:
    device: Device
    health: Health
    placed_at: str
    """Where the fleet says, in numbers; empty while nobody knows what a name there stands for."""
    found_at: str = ""
    """Where it was found by mDNS."""
    reached_at: str = ""
    """Which of the two is tried, or is it."""
    probes: int = 0
    """Since it was alive, or tried elsewhere."""
    bundle: str = ""
    """Digest of what it said it serves."""
    asked: int = 0
    answered: int = 0
    refused: int = 0


class Peers:
    """Everybody but this device, by expert."""

    def __init__(
        self,
        hello: Callable[[], Hello],
        sockets: Sockets,
        numbers: Iterator[int],
        counts: Metrics,
        log: Log,
        look_up: Callable[[Device], None],
    ) -> None:
        """hello: how this device introduces itself at present; look_up: what a host name stands for, see `placed`."""
        self._hello, self._sockets, self._numbers, self._look_up = hello, sockets, numbers, look_up
        self._counts, self._log = counts, log
        self._peers: dict[int, _Peer] = {}
        self._lost: list[int] = []
        self._gone_at: dict[int, float] = {}
        """When nothing more is hoped for from those who took their leave."""
        self.wake_at = 0.0
        """When `tick` is due again: now and then too early, never too late."""

    def become(self, devices: Collection[Device]) -> None:
        """These are the peers from now on; who is reached as before keeps its connection."""
        wanted = {device.expert: device for device in devices}
        self.wake_at = 0.0
        ping_s = max(_PING_S, _PING_A_PEER_S * len(wanted))
        for expert in [e for e in self._peers if e not in wanted]:
            del self._peers[expert]
            self._sockets.disconnect(expert)
            self._gone_at.pop(expert, None)
            self._lost.append(expert)
        for expert, device in wanted.items():
            known = self._peers.get(expert)
            if known is not None and _reached(known.device) == _reached(device):
                known.device = device
                continue
            if known is not None:
                self._gone_at.pop(expert, None)
                self._sockets.disconnect(expert)
                self._lost.append(expert)
            peer = self._peers[expert] = _Peer(device, Health(random.random, ping_s), "")
            if is_numbers(device.address):
                peer.placed_at = device.address
                self._reach(expert, peer, device.address)
            else:
                self._look_up(device)

    def placed(self, device: Device, address: str) -> None:
        """What a host name of the fleet stands for; of no use where the fleet says another by now."""
        peer = self._peers.get(device.expert)
        if peer is not None and _reached(peer.device) == _reached(device) and peer.placed_at != address:
            peer.placed_at = address
            self._try(device.expert, peer, address)

    def found(self, name: str, address: str) -> None:
        """A device of the fleet is said to be elsewhere: believed only while it is not where it was.

        Without keys anybody could say so, and only loopback is listened to.
        """
        for expert, peer in self._peers.items():
            if peer.device.name != name or peer.reached_at == address or not port_of(address):
                continue
            if not self._sockets.guarded and not is_loopback(address):
                continue
            peer.found_at = address
            self._try(expert, peer, address)
            self._log.rarely(f"{name} found", address, peer=name)

    def trusted(self, now: float) -> frozenset[int]:
        """The experts that may be asked."""
        return frozenset([expert for expert, peer in self._peers.items() if peer.health.trusted(now)])

    def expected_s(self, expert: int) -> float:
        """What an answer usually takes; zero while nobody knows."""
        peer = self._peers.get(expert)
        return 0.0 if peer is None or peer.health.rtt_s is None else peer.health.rtt_s

    def patience(self, expert: int) -> float:
        """After how many seconds another is worth asking as well."""
        peer = self._peers.get(expert)
        return float("inf") if peer is None else min(peer.health.p95_s, peer.health.doubt_s)

    def made_sense(self, expert: int) -> None:
        """An answer of this peer was of use."""
        if expert in self._peers:
            self._peers[expert].health.made_sense()

    def ask(self, ask: Ask, now: float) -> bool:
        """Send an Ask; False when there is no way to the peer, which is lost then."""
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
        """Ask it nothing more for now, and let those know who wait for it: `tick` says so."""
        peer = self._peers.get(expert)
        if peer is None:
            return
        self.wake_at = 0.0
        if peer.health.alive:
            self._counts.events[f"peers {why}"] += 1
            self._log.rarely(f"{peer.device.name} {why}", "asked nothing more until it is back", peer=peer.device.name)
            self._lost.append(expert)
        peer.health.failed(why, now)

    def heard(self, expert: int, message: Message | None, request: int | None, now: float) -> Answer | Refuse | None:
        """What a peer replied: an answer or a refusal of an Ask is returned, the rest is between it and us.

        request: of what was no message, where so much could be read
        """
        peer = self._peers.get(expert)
        if peer is None:
            return None
        if isinstance(message, Welcome):
            self._welcomed(expert, peer, message, now)
        elif isinstance(message, Pong):
            peer.health.answered_ping(message.request, now)
        elif isinstance(message, Answer):
            peer.health.heard(message.request, now)
            peer.answered += 1
            return message
        elif isinstance(message, Refuse) and message.request == 0:
            leaves = message.reason == Reason.SHUTTING_DOWN
            self.fail(expert, "left" if leaves else "foreign", now)
            if not leaves:
                self._log.rarely(f"{peer.device.name} refuses us", message.detail, peer=peer.device.name)
        elif isinstance(message, Refuse):
            peer.health.heard(message.request, now, sound=False)
            peer.refused += 1
            if message.reason == Reason.WRONG_TRUNK:
                self.fail(expert, "foreign", now)
            elif message.reason == Reason.SHUTTING_DOWN:
                self.fail(expert, "left", now)
            return message
        else:  # no message at all, or one that nobody asked for
            self.fail(expert, "wrong", now)
            return Refuse(request, Reason.FAILED) if request else None
        return None

    def greeted(self, hello: Hello, sender: Sender, now: float) -> Message:
        """Somebody introduces himself."""
        mine = self._hello()
        peer = self._peers.get(hello.expert)
        if hello.trunk != mine.trunk:
            return Refuse(0, Reason.WRONG_TRUNK, f"the trunk here is {mine.trunk.hex()}, yours {hello.trunk.hex()}")
        if (
            peer is None
            or peer.device.name != hello.device
            or self._sockets.name_of(sender) not in (None, hello.device)
        ):
            return Refuse(0, Reason.BAD_REQUEST, "no device of this fleet: compare fleet.toml there and here")
        if PROTOCOL not in hello.protocols:
            return Refuse(0, Reason.BAD_REQUEST, f"this device speaks protocol {PROTOCOL} alone")
        peer.health.returns(now)
        self.wake_at = 0.0
        return Welcome(mine.device, mine.expert, mine.trunk, mine.capabilities, PROTOCOL, mine.bundle)

    def left(self, leave: Leave, sender: Sender, now: float) -> int | None:
        """A peer takes its leave; its expert, where it is one and it speaks for itself."""
        for expert, peer in self._peers.items():
            if peer.device.name == leave.device and self._sockets.name_of(sender) in (None, leave.device):
                if peer.health.alive:
                    self._gone_at[expert] = now + peer.health.silence_s
                    peer.health.failed("left", now)
                    self.wake_at = 0.0
                    self._counts.events["peers left"] += 1
                return expert
        return None

    def tick(self, now: float) -> list[int]:
        """Probe, ping, give up on the silent; which experts were lost since the last time."""
        for expert, peer in self._peers.items():
            health = peer.health
            if health.overdue(now):
                self.fail(expert, "silent", now)
            due = health.due(now)
            if due == "probe":
                self._look_elsewhere(expert, peer)
                if not self._sockets.send(expert, self._hello()):
                    health.unreachable(now)
            elif due == "ping":
                number = next(self._numbers)
                if self._sockets.send(expert, Ping(number)):
                    health.sent(number, now, timed=False)
                else:
                    self.fail(expert, "lost", now)
        for expert in [expert for expert, at in self._gone_at.items() if now >= at]:
            del self._gone_at[expert]
            self._lost.append(expert)
        due_at = [peer.health.wake_at for peer in self._peers.values()]
        self.wake_at = min([*due_at, *self._gone_at.values()], default=float("inf"))
        lost, self._lost = self._lost, []
        return lost

    def say_goodbye(self, leave: Leave) -> None:
        """To everybody who hears it."""
        for expert in self._peers:
            self._sockets.send(expert, leave)

    def facts(self) -> list[dict[str, Any]]:
        """For a status report."""
        return [
            {
                "name": peer.device.name,
                "expert": expert,
                "address": peer.reached_at or peer.device.address,
                "state": peer.health.state,
                "rtt_ms": _ms(peer.health.rtt_s),
                "p95_ms": _ms(peer.health.p95_s),
                "asked": peer.asked,
                "answered": peer.answered,
                "refused": peer.refused,
                "owed": peer.health.owed,
                "bundle": peer.bundle[:12],
            }
            for expert, peer in sorted(self._peers.items())
        ]

    def _reach(self, expert: int, peer: _Peer, address: str) -> None:
        peer.reached_at, peer.probes = address, 0
        self._sockets.connect(expert, replace(peer.device, address=address))

    def _try(self, expert: int, peer: _Peer, address: str) -> None:
        """Look for it at another place, unless it is alive where it is."""
        if peer.health.alive or peer.reached_at == address:
            return
        try:
            self._reach(expert, peer, address)
        except NetworkError as error:
            self._log.rarely(f"{peer.device.name} cannot be reached", str(error), peer=peer.device.name)
        peer.health.returns(0.0)
        self.wake_at = 0.0

    def _look_elsewhere(self, expert: int, peer: _Peer) -> None:
        """What the fleet says and what was found take turns, and names may stand for something else by now."""
        peer.probes += 1
        if peer.probes % _PROBES == 0:
            if not is_numbers(peer.device.address):
                self._look_up(peer.device)
            elsewhere = peer.found_at if peer.reached_at == peer.placed_at else peer.placed_at
            if elsewhere:
                self._try(expert, peer, elsewhere)

    def _welcomed(self, expert: int, peer: _Peer, welcome: Welcome, now: float) -> None:
        mine = self._hello()
        if (welcome.device, welcome.expert) != (peer.device.name, expert) or welcome.trunk != mine.trunk:
            self.fail(expert, "foreign", now)
            self._log.rarely(f"{peer.device.name} is somebody else", f"{welcome.device}, trunk {welcome.trunk.hex()}")
            return
        was = peer.health.alive
        peer.health.welcomed(now)
        self.wake_at = min(self.wake_at, peer.health.wake_at)
        if peer.health.alive and not was:
            peer.bundle, peer.probes = welcome.bundle, 0
            if self._gone_at.pop(expert, None) is not None:  # what it was asked before it left, nobody knows there
                self._lost.append(expert)
                self.wake_at = 0.0
            self._log.rarely(f"{peer.device.name} alive", peer=peer.device.name)


def _reached(device: Device) -> tuple[Any, ...]:
    """What a connection depends on."""
    return device.name, device.address, device.public_key


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == float("inf") else round(seconds * 1000, 3)
