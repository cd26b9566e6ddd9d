from __future__ import annotations

import contextlib
import time

import pytest
import zmq

from nmoe_edge.bundle.fleet import Device
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device import sockets
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.sockets import Sockets
from nmoe_edge.errors import NetworkError
from nmoe_edge.protocol.messages import Infer, Ping, Pong, Reason, Refuse
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import decode, encode

pytestmark = pytest.mark.socket


@pytest.fixture
def made():
    """A function that makes sockets, which are closed after the test."""
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())

        def socket(kind):
            new = stack.enter_context(context.socket(kind))
            new.setsockopt(zmq.LINGER, 0)
            new.setsockopt(zmq.RCVHWM, 0)
            return new

        yield socket


@pytest.fixture
def ours():
    ours = Sockets("tcp://127.0.0.1:0", None, {}, Metrics(), StderrLog("attic"))
    yield ours
    ours.close()


def test_a_socket_that_is_never_empty_does_not_starve_the_others(ours, made, monkeypatch):
    monkeypatch.setattr(sockets, "_SOCKET_TURN_S", 0.0)  # one message per turn
    peer, caller = made(zmq.ROUTER), made(zmq.DEALER)
    port = peer.bind_to_random_port("tcp://127.0.0.1")
    ours.connect(1, Device("barn", 1, f"tcp://127.0.0.1:{port}", "0" * 64))
    while not ours.send(1, Ping(7)):
        time.sleep(0.01)
    route, *_ = peer.recv_multipart()
    caller.connect(ours.address)
    for number in range(50):
        caller.send_multipart(encode(Ping(number + 1)))
    received = []
    while not received:  # until the first has arrived
        ours.wait(1.0)
        received += ours.receive()
    peer.send_multipart([route, *encode(Pong(7))])
    time.sleep(0.3)
    for _ in range(5):
        ours.wait(1.0)
        received += ours.receive()
    assert (Pong(7), None, None, 1) in received
    assert len(received) < 50


def test_all_replies_of_one_turn_are_delivered(ours, made):
    caller = made(zmq.DEALER)
    caller.connect(ours.address)
    caller.send_multipart(encode(Ping(1)))
    received = []
    while not received:
        ours.wait(1.0)
        received = ours.receive()
    ((_, _, sender, _),) = received
    assert {ours.reply(sender, Pong(number + 1)) for number in range(800)} == {True}
    for number in range(800):
        assert caller.poll(5000)
        assert decode(caller.recv_multipart()) == Pong(number + 1)


def test_without_keys_only_loopback_is_connected(ours):
    with pytest.raises(NetworkError, match="barn: tcp://192.0.2.7:7101 is not loopback, and this device has no keys"):
        ours.connect(1, Device("barn", 1, "tcp://192.0.2.7:7101", "0" * 64, "0" * 40))


def test_a_request_with_too_small_a_budget_is_refused_unread(ours, made):
    caller = made(zmq.DEALER)
    caller.connect(ours.address)
    ours.min_budget_ms = 100.0
    rows = Tensor("uint8", (1, 2), b"ab")
    sent = [Infer(1, 0, 99, rows), Infer(2, 0, 100, rows), Ping(3)]
    for message in sent:
        caller.send_multipart(encode(message))
    received = []
    while len(received) < 2:
        ours.wait(1.0)
        received += ours.receive()
    assert [message for message, *_ in received] == sent[1:]
    assert caller.poll(5000)
    assert decode(caller.recv_multipart()) == Refuse(1, Reason.BUSY)
    assert not caller.poll(50)
