from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from edge.fleets import Impostor, address_of, bright, free_ports, nodes

from nmoe_edge.bench.load import drive, greet, make_asks, make_infers, message_bytes, poisson, warm_up
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.client import Connection
from nmoe_edge.errors import BenchError, CallError
from nmoe_edge.protocol.messages import Reason, Refuse, Result, RowAnswer
from nmoe_edge.protocol.tensor import Tensor

OUTPUTS = Tensor.pack(np.ones((1, 3), "f4"), "float32")


class FakeConnection:
    """A simulated device and clock. answer_at: time sent -> time of the answer in ns, or None for no answer.

    row: experts and missing experts of each answer; full: which sends, counted from 1, find the connection full.
    """

    address = "tcp://simulated:1"

    def __init__(self, monkeypatch, answer_at, row=((0,), ()), full=()):
        self.now = 0
        self.answer_at = answer_at
        self.pending = []  # (time of the answer, request number)
        self.full = full
        self.row = row
        self.asked = 0
        monkeypatch.setattr("time.monotonic_ns", lambda: self.now)

    def send(self, message, wait_s):
        self.asked += 1
        if self.asked in self.full:
            self.now += int(wait_s * 1e9)
            return False
        at = self.answer_at(self.now)
        if at is not None:
            self.pending.append((at, message.request))
        return True

    def receive(self, wait_s):
        wait_until = self.now + int(wait_s * 1e9)
        at, number = first = min(self.pending, default=(wait_until + 1, 0))
        if at > wait_until:
            self.now = wait_until
            return None
        self.pending.remove(first)
        self.now = max(self.now, at)
        experts, missing = self.row
        return Result(number, 0, OUTPUTS, (RowAnswer(experts, (1.0,) * len(experts), missing),))


REQUEST = make_infers(bright(0, 1, 2))


def test_latency_in_an_open_loop_counts_from_the_scheduled_time(monkeypatch):
    connection = FakeConnection(monkeypatch, lambda _now: 1_000_000_000)  # stalls for a second, then answers everything
    found = drive(connection, REQUEST, itertools.count(), 0.5, arrivals=iter([0.1, 0.2, 0.4, 9.0]))
    assert [round(ns / 1e6) for ns in found.took_ns] == [900, 800, 600]
    assert (found.asked, found.unanswered) == (3, 0)


def test_latency_includes_the_wait_for_an_earlier_request_that_could_not_be_sent(monkeypatch):
    connection = FakeConnection(monkeypatch, lambda now: now + 1_000_000, full=(2,))
    found = drive(connection, REQUEST, itertools.count(), 0.5, arrivals=iter([0.1, 0.2, 0.201, 9.0]))
    # The second request blocks for 50 ms and counts as unanswered; the third, of 201 ms, waits for it.
    assert [round(ns / 1e6) for ns in found.took_ns] == [1, 50]
    assert found.unanswered == 1


def test_a_client_in_a_closed_loop_sends_again_after_its_answer(monkeypatch):
    connection = FakeConnection(monkeypatch, lambda now: now + 100_000_000)
    found = drive(connection, REQUEST, itertools.count(), 1.0, clients=3)
    assert (found.asked, len(found.took_ns), found.rows) == (30, 30, 30)
    assert set(found.took_ns) == {100_000_000}


def test_a_request_without_an_answer_is_given_up_and_counted(monkeypatch):
    connection = FakeConnection(monkeypatch, lambda _now: None)
    found = drive(connection, REQUEST, itertools.count(), 2.0, clients=2)
    assert (found.asked, found.unanswered, len(found.took_ns)) == (4, 4, 0)


@pytest.mark.parametrize(
    ("row", "counted"), [(((0,), ()), (1, 0)), (((0,), (2,)), (0, 1)), (((1,), ()), (0, 0)), (((), (1,)), (0, 1))]
)
def test_a_row_counts_as_answered_locally_only_if_the_gate_wanted_it(monkeypatch, row, counted):
    connection = FakeConnection(monkeypatch, lambda now: now + 1_000_000_000, row)
    found = drive(connection, REQUEST, itertools.count(), 0.5, clients=1, own=0)
    assert (found.local_rows, found.degraded) == counted


def test_poisson_arrivals_have_the_given_rate_and_repeat_with_the_seed():
    first = list(itertools.islice(poisson(50, 3), 5000))
    assert first == list(itertools.islice(poisson(50, 3), 5000))
    assert first != list(itertools.islice(poisson(50, 4), 5000))
    gaps = np.diff(first)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)


def test_inputs_and_latents_are_used_in_a_cycle():
    latents = np.arange(6, dtype="f4").reshape(3, 2)
    ask = make_asks(latents, "float32", 4, 1, bytes(16))(2)
    assert ask.latents.unpack()[:, 0].tolist() == [4, 0, 2, 4]
    assert message_bytes(ask) == 64 + 4 * 2 * 4
    assert np.array_equal(REQUEST(4).inputs.unpack(), bright(1))


@pytest.mark.socket
def test_a_peer_welcomes_the_benchmark_and_answers_for_its_expert(fleet):
    manifest = read_bundle(fleet / "attic").manifest
    numbers = itertools.count(1)
    with nodes(fleet, "barn"):
        connection = Connection(address_of(fleet, "barn"), connections=2)
        welcome = greet(connection, manifest)
        assert (welcome.device, welcome.expert) == ("barn", 1)
        request = make_asks(np.ones((2, 4), "f4"), "int8", 1, 1, manifest.trunk_bytes)
        warm_up(connection, request, numbers, 1)  # whether it settles depends on the machine
        found = drive(connection, request, numbers, 0.1, clients=2)
        assert (found.asked, found.rows, found.refused) == (len(found.took_ns), len(found.took_ns), 0)
        wrong = make_asks(np.ones((2, 4), "f4"), "int8", 1, 2, manifest.trunk_bytes)
        assert drive(connection, wrong, numbers, 0.05, clients=1).refused > 0
        with pytest.raises(BenchError, match="this device has expert 1, not 2"):
            warm_up(connection, wrong, numbers, 1)
        with pytest.raises(BenchError, match="the peer refuses attic2"):
            greet(connection, replace(manifest, device="attic2"))
        connection.close()


@pytest.mark.socket
def test_an_address_without_a_device_is_an_error(fleet, monkeypatch):
    monkeypatch.setattr("nmoe_edge.bench.load._CONNECT_S", 0.1)
    (port,) = free_ports(1)
    connection = Connection(f"tcp://127.0.0.1:{port}")
    with pytest.raises(BenchError, match="no answer to Hello"):
        greet(connection, read_bundle(fleet / "attic").manifest)
    with pytest.raises(BenchError, match="no connection within"):
        drive(connection, REQUEST, itertools.count(), 0.1, clients=1)
    connection.close()


@pytest.mark.socket
def test_a_peer_that_sends_invalid_messages_is_an_error(fleet):
    manifest = read_bundle(fleet / "barn").manifest
    with Impostor(address_of(fleet, "barn"), manifest, lambda _ask: [[b"nonsense"]]):
        connection = Connection(address_of(fleet, "barn"))
        greet(connection, read_bundle(fleet / "attic").manifest)
        request = make_asks(np.ones((2, 4), "f4"), "int8", 1, 1, manifest.trunk_bytes)
        with pytest.raises(CallError, match="sent a message that cannot be read"):
            drive(connection, request, itertools.count(), 1.0, clients=1)
        connection.close()


def test_a_refusal_is_counted_with_its_reason(monkeypatch):
    connection = FakeConnection(monkeypatch, lambda now: now + 1)

    def refuse(_wait_s):
        if connection.pending:
            return Refuse(connection.pending.pop()[1], Reason.BUSY)
        connection.now = 10**9
        return None

    connection.receive = refuse
    found = drive(connection, REQUEST, itertools.count(), 0.5, arrivals=iter([0.0, 9.0]))
    assert (found.refused, len(found.took_ns)) == (1, 0)
    assert "busy" in found.refusal
