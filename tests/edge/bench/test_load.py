from __future__ import annotations

import itertools

import numpy as np
import pytest
from edge.fleets import Impostor, address_of, bright, free_ports, nodes

from nmoe_edge.bench.load import asking, drive, greet, inferring, message_bytes, poisson, settled
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.client import Line
from nmoe_edge.errors import BenchError, CallError
from nmoe_edge.protocol.messages import Reason, Refuse, Result, RowAnswer
from nmoe_edge.protocol.tensor import Tensor

OUTPUTS = Tensor.pack(np.ones((1, 3), "f4"), "float32")


class FakeLine:
    """A device and its clock: each question is answered when `answer_at` says, or never."""

    address = "tcp://nobody:1"

    def __init__(self, monkeypatch, answer_at, row=((0,), ()), full=()):
        self.now, self.answer_at, self.due, self.full, self.row = 0, answer_at, [], full, row
        self.asked = 0
        monkeypatch.setattr("time.monotonic_ns", lambda: self.now)

    def send(self, message, wait_s):
        self.asked += 1
        if self.asked in self.full:
            self.now += int(wait_s * 1e9)
            return False
        at = self.answer_at(self.now)
        if at is not None:
            self.due.append((at, message.request))
        return True

    def receive(self, wait_s):
        until = self.now + int(wait_s * 1e9)
        first = min(self.due, default=(until + 1, 0))
        if first[0] > until:
            self.now = until
            return None
        self.due.remove(first)
        self.now = max(self.now, first[0])
        experts, missing = self.row
        return Result(first[1], 0, OUTPUTS, (RowAnswer(experts, (1.0,) * len(experts), missing),))


QUESTION = inferring(bright(0, 1, 2))


def test_a_device_that_stalls_is_charged_from_the_moment_at_which_each_question_was_due(monkeypatch):
    line = FakeLine(monkeypatch, lambda _now: 1_000_000_000)  # says nothing for a second, then everything
    found = drive(line, QUESTION, itertools.count(), 0.5, arrivals=iter([0.1, 0.2, 0.4, 9.0]))
    assert [round(ns / 1e6) for ns in found.took_ns] == [900, 800, 600]
    assert (found.asked, found.unanswered) == (3, 0)


def test_a_question_that_could_not_leave_in_time_is_charged_for_its_wait_too(monkeypatch):
    line = FakeLine(monkeypatch, lambda now: now + 1_000_000, full=(2,))
    found = drive(line, QUESTION, itertools.count(), 0.5, arrivals=iter([0.1, 0.2, 0.201, 9.0]))
    assert [round(ns / 1e6) for ns in found.took_ns] == [1, 50]  # the second had no way out for 50 ms, the third waited
    assert found.unanswered == 1


def test_clients_ask_again_when_they_were_answered_and_not_before(monkeypatch):
    line = FakeLine(monkeypatch, lambda now: now + 100_000_000)
    found = drive(line, QUESTION, itertools.count(), 1.0, clients=3)
    assert (found.asked, len(found.took_ns), found.rows) == (30, 30, 30)
    assert set(found.took_ns) == {100_000_000}


def test_what_is_never_answered_is_given_up_and_counted(monkeypatch):
    line = FakeLine(monkeypatch, lambda _now: None)
    found = drive(line, QUESTION, itertools.count(), 2.0, clients=2)
    assert (found.asked, found.unanswered, len(found.took_ns)) == (4, 4, 0)


@pytest.mark.parametrize(
    ("row", "counted"), [(((0,), ()), (1, 0)), (((0,), (2,)), (0, 1)), (((1,), ()), (0, 0)), (((), (1,)), (0, 1))]
)
def test_a_row_is_at_home_when_it_was_meant_to_be(monkeypatch, row, counted):
    line = FakeLine(monkeypatch, lambda now: now + 1_000_000_000, row)
    found = drive(line, QUESTION, itertools.count(), 0.5, clients=1, own=0)
    assert (found.at_home, found.degraded) == counted


def test_strangers_come_as_often_as_they_should_and_the_same_each_time():
    first, again = (list(itertools.islice(poisson(50, 3), 5000)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(poisson(50, 4), 5000))
    gaps = np.diff(first)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)


def test_inputs_and_latents_are_cycled():
    latents = np.arange(6, dtype="f4").reshape(3, 2)
    ask = asking(latents, "float32", 4, 1, bytes(16))(2)
    assert ask.latents.unpack()[:, 0].tolist() == [4, 0, 2, 4]
    assert message_bytes(ask) == 64 + 4 * 2 * 4
    assert np.array_equal(QUESTION(4).inputs.unpack(), bright(1))


@pytest.mark.socket
def test_a_peer_welcomes_us_and_its_expert_is_asked(fleet):
    manifest = read_bundle(fleet / "attic").manifest
    numbers = itertools.count(1)
    with nodes(fleet, "barn"):
        line = Line(address_of(fleet, "barn"), connections=2)
        welcome = greet(line, manifest)
        assert (welcome.device, welcome.expert) == ("barn", 1)
        question = asking(np.ones((2, 4), "f4"), "int8", 1, 1, manifest.trunk_bytes)
        settled(line, question, numbers, 1)  # whether it does is the machine's business
        found = drive(line, question, numbers, 0.1, clients=2)
        assert (found.asked, found.rows, found.refused) == (len(found.took_ns), len(found.took_ns), 0)
        wrong = asking(np.ones((2, 4), "f4"), "int8", 1, 2, manifest.trunk_bytes)
        assert drive(line, wrong, numbers, 0.05, clients=1).refused > 0
        with pytest.raises(BenchError, match="this device has expert 1, not 2"):
            settled(line, wrong, numbers, 1)
        with pytest.raises(BenchError, match="attic2 is not welcome"):
            greet(
                line,
                type(manifest)(**{name: getattr(manifest, name) for name in manifest.__slots__} | {"device": "attic2"}),
            )
        line.close()


@pytest.mark.socket
def test_where_nobody_is_there_is_no_way(fleet, monkeypatch):
    monkeypatch.setattr("nmoe_edge.bench.load._CONNECT_S", 0.1)
    (port,) = free_ports(1)
    line = Line(f"tcp://127.0.0.1:{port}")
    with pytest.raises(BenchError, match="no answer to our Hello"):
        greet(line, read_bundle(fleet / "attic").manifest)
    with pytest.raises(BenchError, match="no way there"):
        drive(line, QUESTION, itertools.count(), 0.1, clients=1)
    line.close()


@pytest.mark.socket
def test_a_peer_that_talks_nonsense_is_one_line(fleet):
    manifest = read_bundle(fleet / "barn").manifest
    with Impostor(address_of(fleet, "barn"), manifest, lambda _ask: [[b"nonsense"]]):
        line = Line(address_of(fleet, "barn"))
        greet(line, read_bundle(fleet / "attic").manifest)
        question = asking(np.ones((2, 4), "f4"), "int8", 1, 1, manifest.trunk_bytes)
        with pytest.raises(CallError, match="sent a message that cannot be read"):
            drive(line, question, itertools.count(), 1.0, clients=1)
        line.close()


def test_a_refusal_is_counted_with_its_reason(monkeypatch):
    line = FakeLine(monkeypatch, lambda now: now + 1)
    line.receive = lambda wait_s: Refuse(line.due.pop()[1], Reason.BUSY) if line.due else setattr(line, "now", 10**9)
    found = drive(line, QUESTION, itertools.count(), 0.5, arrivals=iter([0.0, 9.0]))
    assert (found.refused, len(found.took_ns)) == (1, 0)
    assert "busy" in found.refusal
