from __future__ import annotations

import signal
import time

import pytest

from nmoe_edge.device.node import Node
from nmoe_edge.device.process import Signals, wait_until_ended

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def calls(monkeypatch):
    """What signals made of a node, in order; the handlers of this process are restored afterwards."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    made = []
    monkeypatch.setattr(Node, "leave", lambda node: made.append(("leave", node)))
    monkeypatch.setattr(Node, "reload", lambda node: made.append(("reload", node)))
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_sigterm_and_sigint_make_the_node_leave_and_sighup_makes_it_reload(calls):
    Signals().attach("node")
    for number in HANDLED:
        signal.raise_signal(number)
    assert calls == [("leave", "node"), ("leave", "node"), ("reload", "node")]


def test_a_signal_that_arrives_before_the_node_is_passed_on_later(calls):
    signals = Signals()
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGTERM)
    assert calls == []
    signals.attach("node")
    assert calls == [("reload", "node"), ("leave", "node")]


def test_waiting_for_the_end_of_a_node_includes_what_it_saves(tiny_fleet, monkeypatch):
    saved = []

    def save_slowly(node):
        time.sleep(0.3)
        saved.append(node)

    monkeypatch.setattr(Node, "_save_mix", save_slowly)
    with Node(tiny_fleet / "attic") as node:
        node.leave()
        wait_until_ended(node)
        assert saved == [node]
