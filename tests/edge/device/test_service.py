from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.manifest import trunk_digest
from nmoe_edge.device import service
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.service import BATCH_ROWS, MAX_ASKS, MAX_ROWS, Service
from nmoe_edge.errors import ModelError
from nmoe_edge.protocol.messages import Answer, Ask, Ping, Pong, Reason, Refuse
from nmoe_edge.protocol.tensor import Tensor


class Fake:
    """Models with an expert that doubles the first three numbers of a latent and remembers its batches."""

    def __init__(self, manifest):
        self.manifest = manifest
        self.runs = []
        self.error = None

    def expert(self, latents):
        self.runs.append(len(latents))
        if self.error is not None:
            raise self.error
        with np.errstate(over="ignore"):
            return 2 * latents[:, :3]


class Harness:
    """A service and its replies."""

    def __init__(self, manifest):
        self.models = Fake(manifest)
        self.metrics = Metrics()
        self.replies = []
        self.service = Service(self.models, lambda *reply: self.replies.append(reply), self.metrics)

    def ask(self, request, rows=1, value=None, **change):
        manifest = self.models.manifest
        latents = np.full((rows, 4), request if value is None else value, np.float32)
        ask = Ask(request, 0, 60_000, manifest.expert, manifest.trunk_bytes, Tensor.pack(latents, "float32"))
        self.offer(replace(ask, **change))

    def offer(self, message, arrived_at=None):
        self.service.offer(f"sender {message.request}", message, time.monotonic() if arrived_at is None else arrived_at)

    def run(self):
        """Run until the queue is empty, like the turns of a node."""
        while len(self.service):
            self.service.run()

    def reasons(self):
        return [message.reason for _, message in self.replies if isinstance(message, Refuse)]


@pytest.fixture
def harness(tiny_fleet):
    return Harness(read_bundle(tiny_fleet / "barn").manifest)


def test_an_ask_is_answered_by_the_expert_and_sent_to_its_sender(harness):
    harness.ask(7, rows=2)
    harness.run()
    ((sender, answer),) = harness.replies
    assert (sender, type(answer), answer.request, answer.expert) == ("sender 7", Answer, 7, 1)
    assert answer.outputs.dtype == "float32"
    assert np.array_equal(answer.outputs.unpack(), np.full((2, 3), 14.0))


def test_an_ask_is_queued_until_run(harness):
    harness.ask(7)
    assert (harness.replies, harness.models.runs, len(harness.service)) == ([], [], 1)
    harness.run()
    assert len(harness.service) == 0


def test_rows_of_several_asks_are_run_together_and_split_again(harness):
    for request, rows in ((1, 2), (2, 1), (3, 5)):
        harness.ask(request, rows)
    harness.run()
    assert harness.models.runs == [8]
    assert [(sender, answer.request, answer.outputs.shape) for sender, answer in harness.replies] == [
        ("sender 1", 1, (2, 3)),
        ("sender 2", 2, (1, 3)),
        ("sender 3", 3, (5, 3)),
    ]
    for _, answer in harness.replies:
        assert (answer.outputs.unpack() == 2 * answer.request).all()
    assert harness.metrics.counts["rows_for_peers"] == 8
    assert harness.metrics.counts["runs_for_peers"] == 1


def test_latents_of_several_dtypes_are_run_together(harness):
    for request, dtype in ((1, "float32"), (2, "float16"), (3, "int8")):
        harness.ask(request, latents=Tensor.pack(np.full((1, 4), request, np.float32), dtype))
    harness.run()
    assert harness.models.runs == [3]
    for _, answer in harness.replies:
        assert answer.outputs.unpack() == pytest.approx(np.full((1, 3), 2 * answer.request), rel=1e-3)


def test_no_more_rows_than_a_batch_are_run_together(harness):
    for request in (1, 2, 3):
        harness.ask(request, BATCH_ROWS // 2)
    harness.run()
    assert harness.models.runs == [BATCH_ROWS, BATCH_ROWS // 2]
    assert [answer.request for _, answer in harness.replies] == [1, 2, 3]


def test_an_ask_of_more_rows_than_a_batch_is_run_by_itself(harness):
    harness.ask(1)
    harness.ask(2, BATCH_ROWS + 1)
    harness.ask(3)
    harness.run()
    assert harness.models.runs == [1, BATCH_ROWS + 1, 1]
    assert [answer.request for _, answer in harness.replies] == [1, 2, 3]


def test_pings_are_answered_in_order(harness):
    harness.ask(1)
    harness.offer(Ping(2))
    harness.ask(3)
    harness.ask(4)
    harness.offer(Ping(5))
    assert harness.replies == []
    harness.run()
    assert [message.request for _, message in harness.replies] == [1, 2, 3, 4, 5]
    assert [message for _, message in harness.replies if isinstance(message, Pong)] == [Pong(2), Pong(5)]
    assert harness.models.runs == [1, 2]


def test_a_ping_does_not_run_the_expert(harness):
    harness.offer(Ping(2))
    harness.run()
    assert (harness.replies, harness.models.runs) == ([("sender 2", Pong(2))], [])


def test_an_ask_with_a_spent_budget_is_never_run(harness):
    now = time.monotonic()
    latents = Tensor.pack(np.ones((1, 4), np.float32), "float32")
    old = Ask(1, 0, 100, 1, harness.models.manifest.trunk_bytes, latents)
    harness.offer(old, now - 1)
    harness.offer(replace(old, request=2, budget_ms=0), now)
    harness.run()
    assert harness.models.runs == []
    assert harness.reasons() == [Reason.EXPIRED] * 2
    assert harness.metrics.counts["asks_refused_expired"] == 2


def test_an_expired_ask_does_not_affect_the_others_in_its_batch(harness):
    harness.ask(1)
    harness.ask(2, budget_ms=0)
    harness.ask(3)
    harness.run()
    assert harness.models.runs == [2]
    answers = {m.request: m.outputs.unpack()[0, 0] for _, m in harness.replies if isinstance(m, Answer)}
    assert answers == {1: 2.0, 3: 6.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trunk": bytes(16)}, Reason.WRONG_TRUNK),
        ({"expert": 0}, Reason.BAD_REQUEST),
        ({"latents": Tensor.pack(np.ones((1, 5), np.float32), "float32")}, Reason.BAD_REQUEST),
    ],
)
def test_an_ask_that_this_expert_cannot_answer_is_refused_at_once(harness, change, reason):
    harness.ask(1, **change)
    assert (harness.reasons(), len(harness.service)) == ([reason], 0)
    harness.run()
    assert (harness.models.runs, len(harness.replies)) == ([], 1)


def test_a_refusal_says_how_many_numbers_came_and_how_many_are_expected(harness):
    harness.ask(1, latents=Tensor.pack(np.ones((1, 5), np.float32), "float32"))
    assert harness.replies[0][1].detail == "latents have 5 numbers; expected 4"


def test_more_asks_than_the_queue_holds_are_refused_at_once(harness):
    for request in range(1, MAX_ASKS + 3):
        harness.ask(request)
    assert [(sender, message.reason) for sender, message in harness.replies] == [
        (f"sender {MAX_ASKS + n}", Reason.BUSY) for n in (1, 2)
    ]
    harness.run()
    assert len(harness.replies) == MAX_ASKS + 2
    assert sum(harness.models.runs) == MAX_ASKS


def test_more_rows_than_the_queue_holds_are_refused_at_once(harness):
    harness.ask(1, MAX_ROWS)
    harness.ask(2)
    assert harness.reasons() == [Reason.BUSY]
    harness.run()
    harness.ask(3)
    harness.run()
    assert harness.reasons() == [Reason.BUSY]
    assert [m.request for _, m in harness.replies if isinstance(m, Answer)] == [1, 3]


def test_an_empty_queue_accepts_an_ask_of_more_rows_than_it_holds(harness):
    harness.ask(1, MAX_ROWS + 1)
    harness.run()
    assert harness.models.runs == [MAX_ROWS + 1]


def test_infinite_outputs_fail_only_the_ask_that_they_belong_to(harness):
    harness.ask(1)
    harness.ask(2, value=3e38)  # doubled, it is more than a float32 holds
    harness.ask(3)
    harness.run()
    assert harness.models.runs == [3]
    assert [type(message) for _, message in harness.replies] == [Answer, Refuse, Answer]
    sender, refusal = harness.replies[1]
    assert (sender, refusal.request, refusal.reason) == ("sender 2", 2, Reason.FAILED)


def test_when_the_expert_fails_the_whole_batch_is_refused(harness):
    harness.models.error = ModelError("expert.onnx: " + "x" * 500)
    harness.ask(1)
    harness.ask(2)
    harness.run()
    assert harness.reasons() == [Reason.FAILED] * 2
    assert [sender for sender, _ in harness.replies] == ["sender 1", "sender 2"]
    assert harness.replies[0][1].detail.startswith("expert.onnx")
    harness.models.error = None
    harness.ask(3)
    harness.run()
    assert isinstance(harness.replies[-1][1], Answer)


def test_latents_for_the_previous_bundle_are_refused_when_they_are_run(harness):
    harness.ask(1)
    manifest, source = harness.models.manifest, "0" * 64
    trunk = trunk_digest(source, manifest.latent.dim, manifest.experts, manifest.outputs)
    harness.service.models = Fake(replace(manifest, extractor_source=source, trunk=trunk))
    harness.run()
    assert harness.reasons() == [Reason.WRONG_TRUNK]
    assert harness.service.models.runs == []


def test_one_run_takes_one_batch_of_a_long_queue(harness):
    for request in (1, 2, 3):
        harness.ask(request, BATCH_ROWS)
    harness.service.run()
    assert [message.request for _, message in harness.replies] == [1]
    assert len(harness.service) == 2


def test_an_error_with_unprintable_text_becomes_a_refusal(harness):
    harness.models.error = ModelError("expert.onnx: \x1b[2J\n" + 300 * "x")
    harness.ask(1)
    harness.run()
    ((_, refuse),) = harness.replies
    assert refuse.reason == Reason.FAILED
    assert refuse.detail.startswith("expert.onnx:  [2J x")


def test_an_ask_with_an_answer_too_large_for_a_message_is_refused_at_once(harness, monkeypatch):
    monkeypatch.setattr(service, "MAX_BYTES", 10 * 3 * 4)
    harness.ask(1, rows=10)
    harness.ask(2, rows=11)
    harness.run()
    (_, refuse), (_, answer) = harness.replies
    assert (refuse.request, refuse.reason) == (2, Reason.BAD_REQUEST)
    assert refuse.detail == "the answer to 11 rows is over 120 bytes; ask with fewer"
    assert answer.request == 1
