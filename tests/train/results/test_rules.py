from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nmoe_train.config import InferenceConfig
from nmoe_train.record import Inference
from nmoe_train.results import rules
from nmoe_train.results.rules import HeldOut, choose_rules

CLASSES = 4
RULES = Inference(1, "probabilities")


def held_out(per_client=40, seed=0, sharp=2.0, bias=0.0, skew=0.85, head=True):
    """Four devices: each has mostly its own class, and training samples of its own and of the next class.

    Experts know every class equally well, and gates draw at random.

    sharp: how many times too sure the experts are; bias: how much each favours its own class
    """
    random = np.random.default_rng(seed)
    clients = np.repeat(np.arange(CLASSES), per_client)
    other = random.integers(0, CLASSES, len(clients))
    y = np.where(random.random(len(clients)) < skew, clients, other)
    likelihood = 3 * random.normal(0, 0.5, (len(y), CLASSES, CLASSES)) + 3 * np.eye(CLASSES)[y][:, None]
    outputs = sharp * (likelihood + bias * np.eye(CLASSES)[None])
    scores = random.normal(0, 1, (CLASSES, len(y), CLASSES))
    seen = np.eye(CLASSES, dtype=bool) | np.roll(np.eye(CLASSES, dtype=bool), 1, axis=1)
    distances = np.where(seen[:, y], 4.0, 40.0) + random.random((CLASSES, len(y)))
    one = 3 * random.normal(0, 0.5, (len(y), CLASSES)) + 3 * np.eye(CLASSES)[y] if head else None
    return HeldOut(
        y, clients, scores.astype(np.float32), outputs.astype(np.float32), distances, seen,
        None if one is None else one.astype(np.float32),
    )  # fmt: skip


def chosen(held, prior=False, **settings):
    return choose_rules(held, RULES, InferenceConfig(**settings), prior, 0)


def test_experts_that_favour_their_own_class_are_calibrated():
    held = held_out(bias=2.0, sharp=3.0)
    found = chosen(held)
    assert not found.calibration.changes_nothing
    assert (found.calibration.scale < 0.7).all()
    own = found.calibration.bias[np.arange(CLASSES), np.arange(CLASSES)]
    assert (own < found.calibration.bias.mean(axis=1) - 0.5).all()


def test_settings_turn_each_rule_off():
    held = held_out(bias=2.0, sharp=3.0)
    off = chosen(held, calibrate=False, adapt=False, local_first=False)
    assert off.calibration.changes_nothing
    assert off.head.changes_nothing
    assert off.inference == RULES
    assert off.steps == 0
    without_novelty = chosen(held, novelty=False).inference
    assert without_novelty.local_first is not None
    assert without_novelty.familiar is None


def test_the_class_mix_is_used_where_every_method_gains():
    held = held_out(per_client=200, sharp=1.0)
    assert chosen(held, calibrate=False).inference.adapt


def test_one_method_that_gets_worse_rules_the_class_mix_out():
    """Experts that favour their own class look as if the device saw that class more often."""
    held = held_out(per_client=200, bias=1.5, sharp=3.0)
    assert not chosen(held, calibrate=False).inference.adapt


def test_answers_with_a_prior_get_no_class_mix_unless_they_are_calibrated():
    held = held_out(per_client=200, sharp=1.0)
    assert not chosen(held, prior=True, calibrate=False).inference.adapt
    biased = held_out(per_client=200, bias=2.0, sharp=3.0)
    assert chosen(biased, prior=True).inference.adapt


def test_the_exit_keeps_own_rows_and_not_those_of_unseen_classes():
    held = held_out(per_client=100, skew=1.0)
    found = chosen(held).inference
    assert 4 <= found.familiar <= 5.0
    kept_own = (held.distances[held.clients, np.arange(len(held.y))] <= found.familiar).mean()
    assert kept_own > 0.75


def test_there_is_no_exit_where_it_would_cost_accuracy():
    """Every expert is sure that each row is of its own class; the gate always finds the expert that is right."""
    held = held_out(per_client=100, skew=0.4)
    outputs = np.broadcast_to(9 * np.eye(CLASSES), held.outputs.shape).astype(np.float32)
    scores = np.stack([9 * np.eye(CLASSES)[held.y]] * CLASSES).astype(np.float32)
    foolish = HeldOut(held.y, held.clients, scores, outputs, np.zeros(held.distances.shape), held.seen)
    found = chosen(foolish, calibrate=False)
    assert found.inference.local_first is None
    assert found.inference.familiar is None
    assert found.head is None


def test_no_accuracy_on_held_out_rows_falls_through_class_mix_and_exit():
    for seed in range(4):
        held = held_out(seed=seed, bias=1.0, sharp=2.0)
        plain = chosen(held, adapt=False, local_first=False)
        full = chosen(held)
        before = rules._accuracy(held, answers(held, plain), False)
        after = rules._accuracy(held, answers(held, full), full.inference.adapt)
        assert all(b - a <= 2 * rules.TOLERANCE for b, a in zip(before, after, strict=True))


def answers(held, found):
    """The fleet's answers to the held-out rows."""
    outputs = found.calibration.apply(held.outputs)
    plain = found.inference.answer_rules()
    return [rules.answer(held.scores[i], outputs, i, plain, held.distances[i]).p for i in range(CLASSES)]


def test_too_few_rows_leave_experts_as_they_are_and_say_so():
    found = chosen(held_out(per_client=4, bias=2.0))
    assert found.calibration.changes_nothing
    assert found.note == (
        "Nothing is calibrated: that takes 20 held-out rows, and there are 16; raise data.held_out or data.train_size"
    )


def test_a_class_without_held_out_rows_is_no_obstacle():
    held = held_out(bias=2.0, sharp=3.0)
    known = held.y != 3
    part = HeldOut(
        held.y[known], held.clients[known], held.scores[:, known], held.outputs[known], held.distances[:, known],
        held.seen, held.head[known],
    )  # fmt: skip
    found = chosen(part)
    assert np.isfinite(found.calibration.bias).all()
    assert np.abs(found.calibration.bias[:, 3]).max() < 1


def test_one_device_alone_needs_no_exit_or_gate():
    held = held_out()
    alone = HeldOut(
        held.y, np.zeros_like(held.clients), held.scores[:1, :, :1], held.outputs[:, :1], held.distances[:1],
        np.ones((1, CLASSES), bool), held.head,
    )  # fmt: skip
    assert chosen(alone).inference.top_k == 1


@pytest.mark.parametrize("seed", range(2))
def test_the_choice_does_not_depend_on_the_order_of_experts_outputs_in_memory(seed):
    held = held_out(seed=seed)
    again = replace(held, outputs=np.asfortranarray(held.outputs))
    one, two = chosen(held), chosen(again)
    assert one.inference == two.inference
    assert one.calibration.bias == pytest.approx(two.calibration.bias, abs=1e-5)
