from __future__ import annotations

import socket
import threading

import pytest
from edge.fleets import ALONE, bright, nodes, settled, states, until

from nmoe_edge.bundle.fleet import FLEET_FILE, Device, read_fleet
from nmoe_edge.device.dns import Resolver, is_numbers
from nmoe_edge.device.node import Node

BARN = Device("barn", 1, "tcp://localhost:7102", "0" * 64)


@pytest.mark.parametrize(
    ("address", "numbers"),
    [
        ("tcp://127.0.0.1:7101", True),
        ("tcp://[::1]:7101", True),
        ("tcp://[fe80::1%eth0]:7101", True),
        ("tcp://localhost:7101", False),
        ("tcp://barn.local:7101", False),
    ],
)
def test_an_address_in_numbers_needs_no_looking_up(address, numbers):
    assert is_numbers(address) == numbers


def test_a_name_becomes_numbers():
    found = threading.Event()
    places = []
    Resolver(lambda *place: (places.append(place), found.set())).look_up(BARN)
    assert found.wait(20)
    assert places == [(BARN, "tcp://127.0.0.1:7102")]


def test_a_name_that_takes_long_is_looked_up_once_at_a_time_and_one_that_fails_again(monkeypatch):
    asked, may_fail, failed = [], threading.Event(), threading.Event()

    def nobody_knows(host, *_):
        asked.append(host)
        assert may_fail.wait(20)
        failed.set()
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    names = Resolver(lambda *_: pytest.fail("it was not found"))
    names.look_up(BARN)
    names.look_up(BARN)
    may_fail.set()
    assert failed.wait(20)
    until(lambda: names.look_up(BARN) or len(asked) > 1)


@pytest.mark.socket
def test_a_name_that_nobody_knows_holds_up_nobody(tiny_fleet, tmp_path, monkeypatch):
    folder = settled(tiny_fleet, tmp_path / "fleet")
    path = folder / FLEET_FILE
    path.write_text(path.read_text().replace("127.0.0.1", "localhost"))
    knows, really = threading.Event(), socket.getaddrinfo

    def slow(*asked):
        knows.wait(20)
        return really(*asked)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    listening = read_fleet(path).named("attic").address.replace("localhost", "127.0.0.1")
    with nodes(folder, "barn"), Node(folder / "attic", path, listen=listening, rules=ALONE) as attic:
        assert attic.infer(bright(0)).rows[0].experts == (0,)
        assert states(attic.status())["barn"] == "unknown"
        knows.set()
        until(lambda: states(attic.status())["barn"] == "alive")
        assert attic.infer(bright(1)).rows[0].experts == (1,)
