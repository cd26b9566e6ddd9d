"""What noise costs, against an accountant that others wrote and know."""

from __future__ import annotations

import math

import pytest

from nmoe_train.stages.privacy import delta_of, epsilon_of, noise_for, spent


@pytest.mark.parametrize(("mu", "releases"), [(0.769, 1), (0.769, 200), (0.2, 20), (0.05, 5), (3.0, 3)])
def test_epsilon_is_that_of_a_reference_accountant(mu, releases):
    accounting = pytest.importorskip("dp_accounting")
    accountant = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(1 / mu), releases))
    assert spent(mu, 1.0, releases, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_epsilon_and_delta_are_one_curve():
    for mu in (0.01, 0.5, 3.0, 40.0):
        epsilon = epsilon_of(mu, 1e-5)
        assert delta_of(epsilon, mu) == pytest.approx(1e-5, rel=1e-6)
    assert epsilon_of(0, 1e-5) == 0
    assert epsilon_of(1e-6, 1e-5) == 0  # so little is moved that δ alone covers it


def test_the_noise_for_a_budget_spends_it_and_no_more():
    for epsilon in (0.01, 1.0, 8.0, 1000.0):
        for releases in (1, 20, 200):
            sigma = noise_for(epsilon, 0.002, releases, 1e-5)
            assert spent(0.002, sigma, releases, 1e-5) == pytest.approx(epsilon, rel=1e-6)
            assert spent(0.002, sigma, releases + 1, 1e-5) > epsilon


def test_more_noise_costs_less_and_more_releases_more():
    costs = [spent(0.01, sigma, 10, 1e-5) for sigma in (0.01, 0.02, 0.1, 1.0)]
    assert costs == sorted(costs, reverse=True)
    costs = [spent(0.01, 0.02, releases, 1e-5) for releases in (0, 1, 2, 50)]
    assert costs == sorted(costs)
    assert costs[0] == 0


def test_without_noise_nothing_is_protected():
    assert spent(0.01, 0.0, 1, 1e-5) == math.inf
    assert epsilon_of(1e5, 1e-5) == math.inf
