from __future__ import annotations

import math

import pytest
import torch

from nmoe_train.errors import DivergedError
from nmoe_train.stages.federation import (
    Update,
    active_clients,
    average,
    cosine,
    generator,
    report,
    require_finite,
    scheduled_clients,
    size_bytes,
)

g = torch.Generator().manual_seed(0)


def test_the_same_seed_round_and_client_draw_the_same_numbers():
    draws = [
        torch.rand(4, generator=generator(*key)).tolist()
        for key in [(0, "a", 1, 2), (0, "a", 1, 2), (0, "a", 2, 1), (1, "a", 1, 2)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


def test_a_share_of_seven_tenths_schedules_seven_of_ten_clients():
    chosen = [scheduled_clients(10, 0.7, 0, "gate", round_) for round_ in range(50)]
    assert all(len(set(part)) == 7 and part == sorted(part) for part in chosen)
    assert set().union(*chosen) == set(range(10))
    assert scheduled_clients(3, 0.01, 0, "gate", 0)


def test_each_scheduled_client_may_drop_out_and_is_then_named():
    rounds = [active_clients(10, 0.7, 0.3, 0, "gate", round_) for round_ in range(200)]
    for round_, (active, dropped) in enumerate(rounds):
        assert sorted((*active, *dropped)) == scheduled_clients(10, 0.7, 0, "gate", round_)
    assert sum(len(dropped) for _, dropped in rounds) / 1400 == pytest.approx(0.3, abs=0.04)
    without_drop = [active_clients(10, 0.7, 0.0, 0, "gate", round_) for round_ in range(20)]
    assert all(dropped == () for _, dropped in without_drop)


def test_the_average_of_equal_models_is_the_model():
    state = {"w": torch.randn(3, 2, generator=g)}
    assert torch.allclose(average([Update(i, state, n, 0.0) for i, n in enumerate((1, 5, 9))])["w"], state["w"])


def test_the_average_weighs_by_client_size_and_does_not_depend_on_the_order_of_updates():
    updates = [
        Update(i, {"w": torch.full((2,), float(v))}, n, 0.0) for i, (v, n) in enumerate([(1, 1), (4, 2), (7, 7)])
    ]
    assert average(updates)["w"].tolist() == pytest.approx([5.8, 5.8])
    assert torch.equal(average(updates)["w"], average(updates[::-1])["w"])


def test_a_nan_or_infinite_loss_or_weight_raises_an_error_that_names_round_and_client():
    good = Update(0, {"w": torch.ones(2)}, 1, 1.0)
    require_finite("gate", 2, [good])
    with pytest.raises(DivergedError, match="gate, round 3, client 1: the loss is nan"):
        require_finite("gate", 2, [good, Update(1, {}, 1, math.nan)])
    with pytest.raises(DivergedError, match="gate, round 3, client 1: a weight is NaN or infinite"):
        require_finite("gate", 2, [good, Update(1, {"w": torch.tensor([1.0, math.inf])}, 1, 1.0)])


def test_a_round_reports_means_weighted_by_client_size_and_no_loss_without_updates():
    updates = [Update(0, {}, 1, 1.0, 0.5), Update(1, {}, 3, 2.0, 1.0)]
    record = report("gate", 4, 9, updates, lost=(2,))
    assert (record.round, record.rounds, record.loss, record.accuracy, record.lost) == (5, 9, 1.75, 0.875, (2,))
    assert report("gate", 0, 9, []).loss is None
    assert report("gate", 0, 9, [Update(0, {}, 1, 1.0)]).accuracy is None


def test_the_size_of_a_state_is_in_bytes():
    assert size_bytes({"w": torch.zeros(3, 2), "n": torch.zeros((), dtype=torch.int64)}) == 32


def test_the_rate_warms_up_and_then_falls_along_a_cosine():
    rates = [cosine(round_, 10, 2) for round_ in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
