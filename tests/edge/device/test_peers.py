from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from nmoe_edge.bundle.fleet import Device
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.protocol.messages import Hello, Leave, Ping, Pong, Welcome

FLEET_ADDRESS, OTHER_ADDRESS = "tcp://127.0.0.1:7102", "tcp://127.0.0.1:7999"
TRUNK = b"t" * 16


class FakeSockets:
    """Sockets that remember their addresses. Only what is sent to `barn_at`, where barn really is, arrives."""

    has_keys = False

    def __init__(self):
        self.addresses = {}
        self.barn_at = ""
        self.sent = []

    def connect(self, expert, device):
        self.addresses[expert] = device.address

    def disconnect(self, expert):
        self.addresses.pop(expert, None)

    def send(self, expert, message):
        self.sent.append(message)
        return self.addresses.get(expert) == self.barn_at

    def name_of(self, _sender):
        return None


class World:
    """Peers with one device, barn, and a clock."""

    def __init__(self, address):
        self.sockets = FakeSockets()
        self.looked_up = []
        self.now = 0.0
        hello = Hello("attic", 0, TRUNK)
        parts = (lambda: hello, self.sockets, itertools.count(1), Metrics(), StderrLog("attic"))
        self.peers = Peers(*parts, lambda device: self.looked_up.append(device.address))
        self.device = Device("barn", 1, address, "0" * 64)
        self.peers.set_devices([self.device])

    def passes(self, seconds):
        """Let time pass: a tick whenever one is needed. Returns the experts that were lost."""
        lost = []
        for until in itertools.count(self.now + 0.05, 0.05):
            if until > self.now + seconds:
                self.now += seconds
                return lost
            if until >= self.peers.wake_at:
                asked = len(self.sockets.sent)
                lost += self.peers.tick(until)
                for message in self.sockets.sent[asked:] if self.barn_is_reached() else ():
                    if isinstance(message, Hello):
                        self.peers.handle_reply(1, Welcome("barn", 1, TRUNK, (), 1, "0" * 64), None, until)
                    elif isinstance(message, Ping):
                        self.peers.handle_reply(1, Pong(message.request), None, until)

    def barn_is_reached(self):
        return self.sockets.barn_at and self.sockets.addresses.get(1) == self.sockets.barn_at

    @property
    def barn(self):
        (report,) = self.peers.report()
        return SimpleNamespace(**report)


@pytest.fixture
def world():
    return World(FLEET_ADDRESS)


def test_a_peer_that_is_not_at_its_discovered_address_is_tried_at_the_fleets(world):
    world.peers.discovered("barn", OTHER_ADDRESS)
    assert world.sockets.addresses == {1: OTHER_ADDRESS}
    world.sockets.barn_at = FLEET_ADDRESS
    world.passes(10)
    assert (world.barn.state, world.barn.address) == ("alive", FLEET_ADDRESS)


def test_a_peer_that_is_not_at_the_fleets_address_is_tried_at_the_discovered_one_even_later(world):
    world.peers.discovered("barn", OTHER_ADDRESS)
    world.passes(30)  # barn is at neither address
    world.sockets.barn_at = OTHER_ADDRESS
    world.passes(10)
    assert (world.barn.state, world.barn.address) == ("alive", OTHER_ADDRESS)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://192.0.2.7:7101", "nonsense"])
def test_an_address_that_no_peer_can_have_changes_nothing(world, address):
    world.peers.discovered("barn", address)
    assert world.sockets.addresses == {1: FLEET_ADDRESS}
    assert world.barn.address == FLEET_ADDRESS


def test_a_host_name_is_not_connected_until_it_is_resolved():
    world = World("tcp://localhost:7102")
    world.passes(5)
    assert world.sockets.addresses == {}
    assert len(world.looked_up) > 1  # it is looked up again
    world.sockets.barn_at = FLEET_ADDRESS
    world.peers.resolved(world.device, FLEET_ADDRESS)
    world.passes(1)
    assert (world.barn.state, world.barn.address) == ("alive", FLEET_ADDRESS)
    world.sockets.barn_at = ""
    world.peers.fail(1, "lost", world.now)
    world.peers.resolved(world.device, OTHER_ADDRESS)  # the name has another address now
    assert world.sockets.addresses == {1: OTHER_ADDRESS}


def test_a_name_that_fleet_toml_no_longer_has_changes_nothing_when_it_is_resolved():
    world = World("tcp://localhost:7102")
    world.peers.set_devices([Device("barn", 1, FLEET_ADDRESS, "0" * 64)])
    world.peers.resolved(world.device, OTHER_ADDRESS)  # the look-up began before the change
    world.passes(30)
    assert world.sockets.addresses == {1: FLEET_ADDRESS}


def test_a_peer_that_left_and_returned_owes_no_earlier_answers_and_is_lost_only_once(world):
    world.sockets.barn_at = FLEET_ADDRESS
    world.passes(1)
    assert world.barn.state == "alive"
    assert world.peers.handle_leave(Leave("barn"), None, world.now) == 1
    world.peers.handle_hello(Hello("barn", 1, TRUNK), None, world.now)
    assert world.passes(0.3) == [1]  # earlier Asks will not be answered
    assert world.barn.state == "alive"
    assert world.passes(5) == []


def test_a_welcomed_peer_is_pinged_in_time(world):
    world.sockets.barn_at = FLEET_ADDRESS
    world.passes(0.2)
    assert world.barn.state == "alive"
    assert world.peers.wake_at <= world.now + 0.5
    world.passes(1)
    assert any(isinstance(message, Ping) for message in world.sockets.sent)
