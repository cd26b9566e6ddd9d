"""The privacy budget agrees with a reference accountant."""

from __future__ import annotations

import math

import pytest

from nmoe_train.stages.privacy import delta_of, epsilon_of, epsilon_spent, noise_for


@pytest.mark.parametrize(("mu", "releases"), [(0.769, 1), (0.769, 200), (0.2, 20), (0.05, 5), (3.0, 3)])
def test_epsilon_agrees_with_a_reference_accountant(mu, releases):
    accounting = pytest.importorskip("dp_accounting")
    accountant = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(1 / mu), releases))
    assert epsilon_spent(mu, 1.0, releases, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_epsilon_of_and_delta_of_are_inverses():
    for mu in (0.01, 0.5, 3.0, 40.0):
        epsilon = epsilon_of(mu, 1e-5)
        assert delta_of(epsilon, mu) == pytest.approx(1e-5, rel=1e-6)
    assert epsilon_of(0, 1e-5) == 0
    assert epsilon_of(1e-6, 1e-5) == 0  # the sensitivity is so small that δ alone covers it


def test_noise_for_a_budget_spends_exactly_the_budget():
    for epsilon in (0.01, 1.0, 8.0, 1000.0):
        for releases in (1, 20, 200):
            sigma = noise_for(epsilon, 0.002, releases, 1e-5)
            assert epsilon_spent(0.002, sigma, releases, 1e-5) == pytest.approx(epsilon, rel=1e-6)
            assert epsilon_spent(0.002, sigma, releases + 1, 1e-5) > epsilon


def test_epsilon_falls_with_noise_and_grows_with_releases():
    costs = [epsilon_spent(0.01, sigma, 10, 1e-5) for sigma in (0.01, 0.02, 0.1, 1.0)]
    assert costs == sorted(costs, reverse=True)
    costs = [epsilon_spent(0.01, 0.02, releases, 1e-5) for releases in (0, 1, 2, 50)]
    assert costs == sorted(costs)
    assert costs[0] == 0


def test_epsilon_without_noise_is_infinite():
    assert epsilon_spent(0.01, 0.0, 1, 1e-5) == math.inf
    assert epsilon_of(1e5, 1e-5) == math.inf
