from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nmoe_edge.protocol.combine import softmax
from nmoe_train.nets import MLP
from nmoe_train.stages import calibration
from nmoe_train.stages.calibration import (
    Calibration,
    calibrated_net,
    cross_fitted,
    fit,
    log_likelihood,
    no_calibration,
    row_weights,
)

SCALE = 0.5
BIAS = np.array([0.8, 0.0, -0.8])


def spoiled(rows, seed=0, mix=(1 / 3, 1 / 3, 1 / 3)):
    """Outputs of two experts that are too sure by 1 / SCALE and favour classes by -BIAS / SCALE; and the truth."""
    random = np.random.default_rng(seed)
    y = random.choice(3, rows, p=mix)
    likelihood = (random.normal(0, 1, (rows, 2, 3)) + np.eye(3)[y][:, None]).astype(np.float32)
    return ((likelihood - BIAS) / SCALE).astype(np.float32), y


def even(rows, experts=2):
    return np.ones((rows, experts))


@pytest.mark.parametrize("mix", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1)], ids=str)
def test_temperature_and_bias_are_found_whatever_the_class_mix_of_the_rows(mix):
    z, y = spoiled(4000, mix=mix)
    found, _ = fit(z, y, even(4000))
    assert found.scale == pytest.approx(SCALE, abs=0.05)
    centred = found.bias - found.bias.mean(axis=1, keepdims=True)
    assert centred == pytest.approx(np.stack([BIAS, BIAS]), abs=0.12)


def test_calibrated_probabilities_are_better_on_other_rows():
    found, _ = fit(*spoiled(300), even(300))
    z, y = spoiled(2000, seed=1)
    assert log_likelihood(found.apply(z), y) > log_likelihood(z, y) + 0.1


def test_the_fit_is_the_minimum_and_its_derivatives_match_differences():
    z, y = spoiled(60)
    arguments = (z[:, 0].astype(np.float64), y, np.ones(60), calibration._log_mix(y, 3))
    theta, _ = calibration._fit_one(*arguments)
    gradient, _ = calibration._derivatives(theta, *arguments)
    assert np.abs(gradient).max() < 1e-2
    point = np.array([0.7, 0.1, -0.2, 0.3])
    gradient, hessian = calibration._derivatives(point, *arguments)
    for i, step in enumerate(1e-5 * np.eye(4)):
        above, below = calibration._loss(point + step, *arguments), calibration._loss(point - step, *arguments)
        assert gradient[i] == pytest.approx((above - below) / 2e-5, rel=1e-5)
        slopes = [calibration._derivatives(point + sign * step, *arguments)[0] for sign in (1, -1)]
        assert hessian[i] == pytest.approx((slopes[0] - slopes[1]) / 2e-5, rel=1e-4, abs=1e-4)


def test_sums_of_clients_give_the_fit_of_all_rows_together():
    """Loss, gradient and Hessian are sums over rows, apart from the penalty, so clients can send them."""
    z, y = spoiled(90)
    log_mix = calibration._log_mix(y, 3)
    point = np.array([0.7, 0.1, -0.2, 0.3])

    def without_penalty(rows):
        part = (z[rows, 0].astype(np.float64), y[rows], np.ones(len(y[rows])), log_mix)
        gradient, hessian = calibration._derivatives(point, *part)
        penalty = calibration._penalty(point)
        return gradient - penalty * calibration._shift(point), hessian - np.diag(penalty)

    parts = [without_penalty(slice(start, start + 30)) for start in (0, 30, 60)]
    whole = without_penalty(slice(None))
    assert sum(gradient for gradient, _ in parts) == pytest.approx(whole[0])
    assert sum(hessian for _, hessian in parts) == pytest.approx(whole[1])


def test_a_class_without_rows_is_not_ruled_out_and_few_rows_change_little():
    z, y = spoiled(400)
    known = y != 2
    found, _ = fit(z[known], y[known], even(int(known.sum())))
    assert found.bias[:, 2].min() > -1
    assert (found.apply(z)[~known].argmax(axis=2) == 2).mean() > 0.4
    few, _ = fit(z[:2], y[:2], even(2))
    assert np.abs(few.bias).max() < 0.5
    assert (few.scale > 0).all()


def test_rows_that_say_the_opposite_of_the_truth_leave_the_scale_above_zero():
    z, y = spoiled(200)
    found, _ = fit(-10 * z, y, even(200))
    assert (found.scale > 0).all()
    assert np.isfinite(found.bias).all()


def test_huge_and_constant_outputs_stay_finite():
    y = np.arange(40) % 4
    for z in (np.zeros((40, 1, 4)), 1e6 * np.eye(4)[y][:, None], np.full((40, 1, 4), -1e6)):
        found, _ = fit(z.astype(np.float32), y, even(40, 1))
        assert np.isfinite(found.apply(z)).all()


def test_no_row_helps_to_calibrate_itself():
    """Labels are drawn at random, so outputs cannot get better than even ones on rows outside the fit."""
    random = np.random.default_rng(0)
    z = random.normal(0, 3, (60, 2, 10)).astype(np.float32)
    y = random.integers(0, 10, 60)
    inside, _ = fit(z, y, even(60))
    outside, _ = cross_fitted(z, y, even(60), 0)
    assert log_likelihood(inside.apply(z), y) > log_likelihood(outside, y) + 0.01


def test_each_seed_draws_other_folds_and_the_same_seed_the_same():
    z, y = spoiled(80)
    first, again, other = (cross_fitted(z, y, even(80), seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_count_by_how_often_an_expert_is_asked():
    shares = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert row_weights(shares, 1.0).tolist() == even(4).tolist()
    weights = row_weights(shares, 0.5)
    assert weights.mean(axis=0) == pytest.approx([1, 1])
    assert weights[2, 1] / weights[0, 1] == pytest.approx(3)  # 0.5 + 0.5 · 2 · 1, beside 0.5
    never_asked = row_weights(np.array([[1.0, 0.0]] * 4), 0.5)
    assert never_asked[:, 1].tolist() == [1.0] * 4


def test_an_expert_of_few_classes_stays_sure_of_the_rows_it_is_asked_about():
    """Two experts know one half of four classes each, and the gate sends every row to the right one."""
    random = np.random.default_rng(1)
    y = random.integers(0, 4, 400)
    z = random.normal(0, 1, (400, 2, 4)) + 5 * np.eye(4)[y][:, None]
    z[:, 0, 2:] = -8
    z[:, 1, :2] = -8
    right = (y >= 2).astype(int)
    shares = np.eye(2)[right]

    def confidence(every_row):
        found, _ = fit(z.astype(np.float32), y, row_weights(shares, every_row))
        asked = found.apply(z)[np.arange(400), right]
        return softmax(asked)[np.arange(400), y].mean()

    assert confidence(0.5) > confidence(1.0) + 0.05


@pytest.mark.parametrize(
    "net",
    [
        MLP(5, 3, [4]),
        nn.Linear(5, 3),
        nn.Linear(5, 3, bias=False),
        nn.Sequential(nn.Linear(5, 3), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)),
    ],
    ids=["mlp", "linear", "without bias", "another last layer", "sequence without bias"],
)
def test_a_calibrated_network_scales_and_shifts_the_outputs_and_leaves_the_original_alone(net):
    h = torch.randn(6, 5)
    bias = np.array([0.5, -1, 2], np.float32)
    with torch.no_grad():
        before = net(h).clone()
        after = calibrated_net(net, 0.7, bias)(h)
        assert torch.allclose(after, 0.7 * before + torch.from_numpy(bias), atol=1e-5)
        assert torch.equal(net(h), before)


@pytest.mark.parametrize(
    ("scale", "bias"),
    [
        (np.ones(2), np.zeros((3, 4))),
        (np.ones((2, 1)), np.zeros((2, 4))),
        (np.array([1.0, 0.0]), np.zeros((2, 4))),
        (np.array([1.0, np.nan]), np.zeros((2, 4))),
        (np.ones(2), np.full((2, 4), np.inf)),
    ],
    ids=["counts differ", "deep", "zero", "nan", "infinite"],
)
def test_a_calibration_out_of_range_is_refused(scale, bias):
    with pytest.raises(ValueError, match="scale"):
        Calibration(scale.astype(np.float32), bias.astype(np.float32))


def test_no_calibration_changes_nothing():
    nothing = no_calibration(2, 3)
    z, _ = spoiled(5)
    assert nothing.changes_nothing
    assert np.array_equal(nothing.apply(z), z)
