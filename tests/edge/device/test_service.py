from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.manifest import trunk_digest
from nmoe_edge.device import service
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.service import BATCH_ROWS, MOST_ASKS, MOST_ROWS, Service
from nmoe_edge.errors import ModelError
from nmoe_edge.protocol.messages import Answer, Ask, Ping, Pong, Reason, Refuse
from nmoe_edge.protocol.tensor import Tensor


class Fake:
    """Models whose expert doubles the first three numbers of a latent, and remembers what it was asked."""

    def __init__(self, manifest):
        self.manifest, self.runs, self.error = manifest, [], None

    def expert(self, latents):
        self.runs.append(len(latents))
        if self.error is not None:
            raise self.error
        with np.errstate(over="ignore"):
            return 2 * latents[:, :3]


class Desk:
    """A service, and what it replied."""

    def __init__(self, manifest):
        self.models, self.counts, self.replies = Fake(manifest), Metrics(), []
        self.service = Service(self.models, lambda *reply: self.replies.append(reply), self.counts)

    def ask(self, request, rows=1, value=None, **change):
        manifest = self.models.manifest
        latents = np.full((rows, 4), request if value is None else value, np.float32)
        ask = Ask(request, 0, 60_000, manifest.expert, manifest.trunk_bytes, Tensor.pack(latents, "float32"))
        self.offer(replace(ask, **change))

    def offer(self, message, came_at=None):
        self.service.offer(f"asker {message.request}", message, time.monotonic() if came_at is None else came_at)

    def run(self):
        """As turns of a node do."""
        while len(self.service):
            self.service.run()

    def reasons(self):
        return [message.reason for _, message in self.replies if isinstance(message, Refuse)]


@pytest.fixture
def desk(tiny_fleet):
    return Desk(read_bundle(tiny_fleet / "barn").manifest)


def test_an_ask_is_answered_to_its_asker_by_the_expert(desk):
    desk.ask(7, rows=2)
    desk.run()
    ((sender, answer),) = desk.replies
    assert (sender, type(answer), answer.request, answer.expert) == ("asker 7", Answer, 7, 1)
    assert answer.outputs.dtype == "float32"
    assert np.array_equal(answer.outputs.unpack(), np.full((2, 3), 14.0))


def test_nothing_is_run_before_its_turn(desk):
    desk.ask(7)
    assert (desk.replies, desk.models.runs, len(desk.service)) == ([], [], 1)
    desk.run()
    assert len(desk.service) == 0


def test_rows_of_several_asks_are_run_together_and_split_rightly(desk):
    for request, rows in ((1, 2), (2, 1), (3, 5)):
        desk.ask(request, rows)
    desk.run()
    assert desk.models.runs == [8]
    assert [(sender, answer.request, answer.outputs.shape) for sender, answer in desk.replies] == [
        ("asker 1", 1, (2, 3)),
        ("asker 2", 2, (1, 3)),
        ("asker 3", 3, (5, 3)),
    ]
    for _, answer in desk.replies:
        assert (answer.outputs.unpack() == 2 * answer.request).all()
    assert desk.counts.events["rows answered for others"] == 8
    assert desk.counts.events["runs for others"] == 1


def test_latents_of_several_dtypes_are_run_together(desk):
    for request, dtype in ((1, "float32"), (2, "float16"), (3, "int8")):
        desk.ask(request, latents=Tensor.pack(np.full((1, 4), request, np.float32), dtype))
    desk.run()
    assert desk.models.runs == [3]
    for _, answer in desk.replies:
        assert answer.outputs.unpack() == pytest.approx(np.full((1, 3), 2 * answer.request), rel=1e-3)


def test_no_more_rows_than_a_batch_are_run_together(desk):
    for request in (1, 2, 3):
        desk.ask(request, BATCH_ROWS // 2)
    desk.run()
    assert desk.models.runs == [BATCH_ROWS, BATCH_ROWS // 2]
    assert [answer.request for _, answer in desk.replies] == [1, 2, 3]


def test_an_ask_of_more_rows_than_a_batch_is_run_as_it_came(desk):
    desk.ask(1)
    desk.ask(2, BATCH_ROWS + 1)
    desk.ask(3)
    desk.run()
    assert desk.models.runs == [1, BATCH_ROWS + 1, 1]
    assert [answer.request for _, answer in desk.replies] == [1, 2, 3]


def test_pings_are_answered_in_their_turn(desk):
    desk.ask(1)
    desk.offer(Ping(2))
    desk.ask(3)
    desk.ask(4)
    desk.offer(Ping(5))
    assert desk.replies == []
    desk.run()
    assert [message.request for _, message in desk.replies] == [1, 2, 3, 4, 5]
    assert [message for _, message in desk.replies if isinstance(message, Pong)] == [Pong(2), Pong(5)]
    assert desk.models.runs == [1, 2]


def test_a_ping_alone_runs_no_expert(desk):
    desk.offer(Ping(2))
    desk.run()
    assert (desk.replies, desk.models.runs) == ([("asker 2", Pong(2))], [])


def test_what_came_too_long_ago_is_never_run(desk):
    now = time.monotonic()
    latents = Tensor.pack(np.ones((1, 4), np.float32), "float32")
    old = Ask(1, 0, 100, 1, desk.models.manifest.trunk_bytes, latents)
    desk.offer(old, now - 1)
    desk.offer(replace(old, request=2, budget_ms=0), now)
    desk.run()
    assert desk.models.runs == []
    assert desk.reasons() == [Reason.EXPIRED] * 2
    assert desk.counts.events["refused expired"] == 2


def test_the_expired_do_not_take_their_neighbours_along(desk):
    desk.ask(1)
    desk.ask(2, budget_ms=0)
    desk.ask(3)
    desk.run()
    assert desk.models.runs == [2]
    answers = {m.request: m.outputs.unpack()[0, 0] for _, m in desk.replies if isinstance(m, Answer)}
    assert answers == {1: 2.0, 3: 6.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trunk": bytes(16)}, Reason.WRONG_TRUNK),
        ({"expert": 0}, Reason.BAD_REQUEST),
        ({"latents": Tensor.pack(np.ones((1, 5), np.float32), "float32")}, Reason.BAD_REQUEST),
    ],
)
def test_what_this_expert_cannot_answer_is_refused_at_once(desk, change, reason):
    desk.ask(1, **change)
    assert (desk.reasons(), len(desk.service)) == ([reason], 0)
    desk.run()
    assert (desk.models.runs, len(desk.replies)) == ([], 1)


def test_more_asks_than_the_queue_holds_are_refused_at_once(desk):
    for request in range(1, MOST_ASKS + 3):
        desk.ask(request)
    assert [(sender, message.reason) for sender, message in desk.replies] == [
        (f"asker {MOST_ASKS + n}", Reason.BUSY) for n in (1, 2)
    ]
    desk.run()
    assert len(desk.replies) == MOST_ASKS + 2
    assert sum(desk.models.runs) == MOST_ASKS


def test_more_rows_than_the_queue_holds_are_refused_at_once(desk):
    desk.ask(1, MOST_ROWS)
    desk.ask(2)
    assert desk.reasons() == [Reason.BUSY]
    desk.run()
    desk.ask(3)
    desk.run()
    assert desk.reasons() == [Reason.BUSY]
    assert [m.request for _, m in desk.replies if isinstance(m, Answer)] == [1, 3]


def test_an_ask_of_more_rows_than_the_queue_holds_is_taken_by_an_empty_one(desk):
    desk.ask(1, MOST_ROWS + 1)
    desk.run()
    assert desk.models.runs == [MOST_ROWS + 1]


def test_outputs_that_are_no_numbers_fail_for_their_asker_alone(desk):
    desk.ask(1)
    desk.ask(2, value=3e38)  # doubled, more than a float holds
    desk.ask(3)
    desk.run()
    assert desk.models.runs == [3]
    assert [type(message) for _, message in desk.replies] == [Answer, Refuse, Answer]
    sender, refusal = desk.replies[1]
    assert (sender, refusal.request, refusal.reason) == ("asker 2", 2, Reason.FAILED)


def test_an_expert_that_breaks_refuses_all_that_were_run_together(desk):
    desk.models.error = ModelError("expert.onnx: " + "x" * 500)
    desk.ask(1)
    desk.ask(2)
    desk.run()
    assert desk.reasons() == [Reason.FAILED] * 2
    assert [sender for sender, _ in desk.replies] == ["asker 1", "asker 2"]
    assert desk.replies[0][1].detail.startswith("expert.onnx")
    desk.models.error = None
    desk.ask(3)
    desk.run()
    assert isinstance(desk.replies[-1][1], Answer)


def test_latents_of_the_bundle_before_are_refused_when_their_turn_comes(desk):
    desk.ask(1)
    manifest, source = desk.models.manifest, "0" * 64
    trunk = trunk_digest(source, manifest.latent.dim, manifest.experts, manifest.outputs)
    desk.service.models = Fake(replace(manifest, extractor_source=source, trunk=trunk))
    desk.run()
    assert desk.reasons() == [Reason.WRONG_TRUNK]
    assert desk.service.models.runs == []


def test_a_long_queue_lets_others_have_their_turn(desk):
    for request in (1, 2, 3):
        desk.ask(request, BATCH_ROWS)
    desk.service.run()
    assert [message.request for _, message in desk.replies] == [1]
    assert len(desk.service) == 2


def test_what_breaks_with_unprintable_words_is_a_refusal_all_the_same(desk):
    desk.models.error = ModelError("expert.onnx: \x1b[2J\n" + 300 * "x")
    desk.ask(1)
    desk.run()
    ((_, refuse),) = desk.replies
    assert refuse.reason == Reason.FAILED
    assert refuse.detail.startswith("expert.onnx:  [2J x")


def test_an_answer_that_no_message_can_hold_is_refused_before_it_is_made(desk, monkeypatch):
    monkeypatch.setattr(service, "MOST_BYTES", 10 * 3 * 4)
    desk.ask(1, rows=10)
    desk.ask(2, rows=11)
    desk.run()
    refuse, answer = (message for _, message in desk.replies)
    assert (refuse.request, refuse.reason) == (2, Reason.BAD_REQUEST)
    assert refuse.detail == "the answer to 11 rows is over 120 bytes; ask with fewer"
    assert answer.request == 1
