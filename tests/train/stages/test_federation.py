from __future__ import annotations

import math

import pytest
import torch

from nmoe_train.errors import DivergedError
from nmoe_train.stages.federation import (
    Update,
    attending,
    average,
    check,
    cosine,
    generator,
    participants,
    report,
    size,
)

g = torch.Generator().manual_seed(0)


def test_one_seed_round_and_client_is_one_source_of_randomness():
    draws = [
        torch.rand(4, generator=generator(*key)).tolist()
        for key in [(0, "a", 1, 2), (0, "a", 1, 2), (0, "a", 2, 1), (1, "a", 1, 2)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


def test_seven_of_ten_clients_take_part():
    chosen = [participants(10, 0.7, 0, "gate", round_) for round_ in range(50)]
    assert all(len(set(part)) == 7 and part == sorted(part) for part in chosen)
    assert set().union(*chosen) == set(range(10))
    assert participants(3, 0.01, 0, "gate", 0)


def test_of_those_who_take_part_some_drop_out_and_are_named():
    rounds = [attending(10, 0.7, 0.3, 0, "gate", round_) for round_ in range(200)]
    assert all(sorted((*here, *lost)) == participants(10, 0.7, 0, "gate", i) for i, (here, lost) in enumerate(rounds))
    assert sum(len(lost) for _, lost in rounds) / 1400 == pytest.approx(0.3, abs=0.04)
    assert all(lost == () for _, lost in (attending(10, 0.7, 0.0, 0, "gate", i) for i in range(20)))


def test_the_average_of_equal_models_is_the_model():
    state = {"w": torch.randn(3, 2, generator=g)}
    assert torch.allclose(average([Update(i, state, n, 0.0) for i, n in enumerate((1, 5, 9))])["w"], state["w"])


def test_the_average_weighs_by_client_size_whatever_the_order():
    updates = [
        Update(i, {"w": torch.full((2,), float(v))}, n, 0.0) for i, (v, n) in enumerate([(1, 1), (4, 2), (7, 7)])
    ]
    assert average(updates)["w"].tolist() == pytest.approx([5.8, 5.8])
    assert torch.equal(average(updates)["w"], average(updates[::-1])["w"])


def test_a_loss_or_a_weight_that_is_no_number_names_round_and_client():
    good = Update(0, {"w": torch.ones(2)}, 1, 1.0)
    check("gate", 2, [good])
    with pytest.raises(DivergedError, match="gate, round 3, client 1: the loss is nan"):
        check("gate", 2, [good, Update(1, {}, 1, math.nan)])
    with pytest.raises(DivergedError, match="gate, round 3, client 1: a weight is no number"):
        check("gate", 2, [good, Update(1, {"w": torch.tensor([1.0, math.inf])}, 1, 1.0)])


def test_a_round_is_reported_by_client_size_and_without_anybody_has_no_loss():
    updates = [Update(0, {}, 1, 1.0, 0.5), Update(1, {}, 3, 2.0, 1.0)]
    told = report("gate", 4, 9, updates, lost=(2,))
    assert (told.round, told.rounds, told.loss, told.accuracy, told.lost) == (5, 9, 1.75, 0.875, (2,))
    assert report("gate", 0, 9, []).loss is None
    assert report("gate", 0, 9, [Update(0, {}, 1, 1.0)]).accuracy is None


def test_the_size_of_a_state_is_its_bytes():
    assert size({"w": torch.zeros(3, 2), "n": torch.zeros((), dtype=torch.int64)}) == 32


def test_the_rate_warms_up_and_falls_like_a_cosine():
    rates = [cosine(round_, 10, 2) for round_ in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
