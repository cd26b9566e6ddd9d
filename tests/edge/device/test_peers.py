from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from nmoe_edge.bundle.fleet import Device
from nmoe_edge.common.log import Log
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.protocol.messages import Hello, Leave, Ping, Pong, Welcome

HERE, THERE = "tcp://127.0.0.1:7102", "tcp://127.0.0.1:7999"
TRUNK = b"t" * 16


class Wires:
    """Sockets that remember where they lead; whoever is at `home` hears what is sent there."""

    guarded = False

    def __init__(self):
        self.leads, self.home, self.sent = {}, "", []

    def connect(self, expert, device):
        self.leads[expert] = device.address

    def disconnect(self, expert):
        self.leads.pop(expert, None)

    def send(self, expert, message):
        self.sent.append(message)
        return self.leads.get(expert) == self.home

    def name_of(self, _sender):
        return None


class World:
    """Peers that know barn, and a clock."""

    def __init__(self, address):
        self.wires, self.looked_up, self.now = Wires(), [], 0.0
        hello = Hello("attic", 0, TRUNK)
        parts = (lambda: hello, self.wires, itertools.count(1), Metrics(), Log("attic"))
        self.peers = Peers(*parts, lambda device: self.looked_up.append(device.address))
        self.device = Device("barn", 1, address, "0" * 64)
        self.peers.become([self.device])

    def passes(self, seconds):
        """As a node lives through it: a turn when one is due."""
        lost = []
        for until in itertools.count(self.now + 0.05, 0.05):
            if until > self.now + seconds:
                self.now += seconds
                return lost
            if until >= self.peers.wake_at:
                asked = len(self.wires.sent)
                lost += self.peers.tick(until)
                for message in self.wires.sent[asked:] if self.at_home() else ():
                    if isinstance(message, Hello):
                        self.peers.heard(1, Welcome("barn", 1, TRUNK, (), 1, "0" * 64), None, until)
                    elif isinstance(message, Ping):
                        self.peers.heard(1, Pong(message.request), None, until)

    def at_home(self):
        return self.wires.home and self.wires.leads.get(1) == self.wires.home

    @property
    def barn(self):
        (facts,) = self.peers.facts()
        return SimpleNamespace(**facts)


@pytest.fixture
def world():
    return World(HERE)


def test_where_somebody_was_said_to_be_and_is_not_is_given_up_for_what_the_fleet_says(world):
    world.peers.found("barn", THERE)
    assert world.wires.leads == {1: THERE}
    world.wires.home = HERE
    world.passes(10)
    assert (world.barn.state, world.barn.address) == ("alive", HERE)


def test_who_is_not_where_the_fleet_says_is_found_where_he_was_heard_of_even_later(world):
    world.peers.found("barn", THERE)
    world.passes(30)  # nobody is anywhere
    world.wires.home = THERE
    world.passes(10)
    assert (world.barn.state, world.barn.address) == ("alive", THERE)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://192.0.2.7:7101", "nonsense"])
def test_what_can_be_no_place_of_a_peer_changes_nothing(world, address):
    world.peers.found("barn", address)
    assert world.wires.leads == {1: HERE}
    assert world.barn.address == HERE


def test_a_name_leads_nowhere_until_somebody_knows_what_it_stands_for():
    world = World("tcp://localhost:7102")
    world.passes(5)
    assert world.wires.leads == {}
    assert len(world.looked_up) > 1  # it is asked for again
    world.wires.home = HERE
    world.peers.placed(world.device, HERE)
    world.passes(1)
    assert (world.barn.state, world.barn.address) == ("alive", HERE)
    world.wires.home = ""
    world.peers.fail(1, "lost", world.now)
    world.peers.placed(world.device, THERE)  # the name stands for something else by now
    assert world.wires.leads == {1: THERE}


def test_what_a_name_stood_for_that_the_fleet_says_no_more_changes_nothing():
    world = World("tcp://localhost:7102")
    world.peers.become([Device("barn", 1, HERE, "0" * 64)])
    world.peers.placed(world.device, THERE)  # it was being looked up meanwhile
    world.passes(30)
    assert world.wires.leads == {1: HERE}


def test_who_left_and_is_back_owes_nothing_of_before_and_is_not_lost_later(world):
    world.wires.home = HERE
    world.passes(1)
    assert world.barn.state == "alive"
    assert world.peers.left(Leave("barn"), None, world.now) == 1
    world.peers.greeted(Hello("barn", 1, TRUNK), None, world.now)
    assert world.passes(0.3) == [1]  # what was asked before is nobody's now
    assert world.barn.state == "alive"
    assert world.passes(5) == []


def test_a_welcome_makes_the_next_ping_due_in_time(world):
    world.wires.home = HERE
    world.passes(0.2)
    assert world.barn.state == "alive"
    assert world.peers.wake_at <= world.now + 0.5
    world.passes(1)
    assert any(isinstance(message, Ping) for message in world.wires.sent)
