from __future__ import annotations

import socket
import threading

import pytest
from edge.fleets import NO_HEDGES, bright, copied_fleet, nodes, states, wait_until

from nmoe_edge.bundle.fleet import FLEET_FILE, Device, read_fleet
from nmoe_edge.device.dns import Resolver, is_numeric
from nmoe_edge.device.node import Node

BARN = Device("barn", 1, "tcp://localhost:7102", "0" * 64)


@pytest.mark.parametrize(
    ("address", "numeric"),
    [
        ("tcp://127.0.0.1:7101", True),
        ("tcp://[::1]:7101", True),
        ("tcp://[fe80::1%eth0]:7101", True),
        ("tcp://localhost:7101", False),
        ("tcp://barn.local:7101", False),
    ],
)
def test_an_ip_address_is_numeric_and_a_host_name_is_not(address, numeric):
    assert is_numeric(address) == numeric


def test_a_host_name_is_resolved():
    resolved = threading.Event()
    calls = []
    Resolver(lambda *call: (calls.append(call), resolved.set())).look_up(BARN)
    assert resolved.wait(20)
    assert calls == [(BARN, "tcp://127.0.0.1:7102")]


def test_a_name_is_looked_up_once_at_a_time_and_again_after_a_failure(monkeypatch):
    asked = []
    may_fail = threading.Event()
    failed = threading.Event()

    def fail(host, *_):
        asked.append(host)
        assert may_fail.wait(20)
        failed.set()
        raise socket.gaierror("name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    resolver = Resolver(lambda *_: pytest.fail("it was resolved"))
    resolver.look_up(BARN)
    resolver.look_up(BARN)
    may_fail.set()
    assert failed.wait(20)
    wait_until(lambda: resolver.look_up(BARN) or len(asked) > 1)


@pytest.mark.socket
def test_a_name_that_cannot_be_resolved_delays_no_other_request(tiny_fleet, tmp_path, monkeypatch):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet")
    path = folder / FLEET_FILE
    path.write_text(path.read_text().replace("127.0.0.1", "localhost"))
    may_resolve, getaddrinfo = threading.Event(), socket.getaddrinfo

    def slow(*arguments):
        may_resolve.wait(20)
        return getaddrinfo(*arguments)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    listening = read_fleet(path).named("attic").address.replace("localhost", "127.0.0.1")
    with nodes(folder, "barn"), Node(folder / "attic", path, listen=listening, rules=NO_HEDGES) as attic:
        assert attic.infer(bright(0)).rows[0].experts == (0,)
        assert states(attic.status())["barn"] == "unknown"
        may_resolve.set()
        wait_until(lambda: states(attic.status())["barn"] == "alive")
        assert attic.infer(bright(1)).rows[0].experts == (1,)
