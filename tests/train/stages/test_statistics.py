from __future__ import annotations

import math

import pytest
import torch

from nmoe_train.config import GateConfig
from nmoe_train.errors import RunError
from nmoe_train.stages.privacy import epsilon_spent
from nmoe_train.stages.statistics import (
    Statistics,
    as_arrays,
    client_statistics,
    epsilon_of_release,
    from_arrays,
    from_state,
    noise_of,
    to_state,
)

DIM = 3
CLASSES = 4


def config(statistics="moments", **settings):
    return GateConfig(method="statgate", statistics=statistics, **settings)


def rows(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=g) + 2, torch.randint(0, CLASSES - 1, (n,), generator=g)


def test_means_are_those_of_each_class_and_the_covariance_that_within_classes():
    h, y = rows()
    found = client_statistics(h, y, CLASSES, config(statistics="means"), 0, 0)
    inside = torch.empty_like(h)
    for k in range(CLASSES - 1):
        assert torch.allclose(found.means[k], h[y == k].mean(0), atol=1e-5)
        assert found.shares[k] == pytest.approx(float((y == k).double().mean()))
        inside[y == k] = h[y == k] - h[y == k].mean(0)
    assert not found.means[-1].any()
    assert found.shares[-1] == 0
    assert torch.allclose(found.spread, inside.T @ inside / len(h), atol=1e-5)


def test_moments_need_no_labels():
    h, y = rows()
    found = client_statistics(h, y, CLASSES, config(), 0, 0)
    other = client_statistics(h, y.flip(0), CLASSES, config(), 0, 0)
    assert torch.allclose(found.spread, torch.cov(h.T, correction=0), atol=1e-5)
    assert torch.allclose(found.means[0], h.mean(0), atol=1e-5)
    assert torch.equal(found.spread, other.spread)


def test_long_latents_get_variances_alone():
    assert config().is_diagonal(1025)
    assert not config().is_diagonal(1024)
    found = client_statistics(*rows(), CLASSES, config(covariance="diagonal"), 0, 0)
    assert torch.allclose(found.spread, rows()[0].var(0, correction=0), atol=1e-5)


def test_statistics_survive_being_sent_and_stored():
    for settings in (config(), config(statistics="means"), config(covariance="diagonal")):
        sent = [client_statistics(*rows(seed=i), CLASSES, settings, 0, i) for i in range(2)]
        stored = from_arrays(as_arrays(sent), 2, DIM)
        for before, after in zip(sent, stored, strict=True):
            assert before.rows == after.rows
            assert torch.equal(before.means, after.means)
            assert torch.equal(before.spread, after.spread)
            assert torch.equal(before.shares, from_state(to_state(before)).shares)
    with pytest.raises(RunError, match="of 3 clients"):
        from_arrays(as_arrays(sent), 3, DIM)
    with pytest.raises(RunError, match="latents of 7 numbers"):
        from_arrays(as_arrays(sent), 2, 7)


def test_replacing_a_row_moves_what_is_published_by_no_more_than_the_noise_allows_for():
    """The largest move: one row changes its direction and its class."""
    n = 8
    settings = config(statistics="means", epsilon=1.0)
    sigma = noise_of(settings, n, DIM)
    bound = math.sqrt(2) * 2 * DIM / n
    assert epsilon_spent(bound, sigma, 1, settings.delta) == pytest.approx(1.0, rel=1e-6)

    def matrix(h, y):
        h = h * (DIM**0.5 / h.norm(dim=1, keepdim=True)).clamp(max=1)
        u = torch.cat([h, DIM**0.5 * torch.nn.functional.one_hot(y, CLASSES)], 1)
        return u.T @ u / n

    h = torch.zeros(n, DIM)
    y = torch.zeros(n, dtype=torch.long)
    h[0, 0] = 100.0
    other_h, other_y = h.clone(), y.clone()
    other_h[0] = torch.tensor([0.0, 100.0, 0.0])
    other_y[0] = 1
    assert float((matrix(h, y) - matrix(other_h, other_y)).norm()) == pytest.approx(bound, rel=1e-5)


def test_noise_falls_with_the_budget_and_depends_on_the_client():
    h, y = rows(2000)
    exact = client_statistics(h, y, CLASSES, config(radius=100.0), 0, 0)

    def error(epsilon, client=0):
        settings = config(epsilon=epsilon, radius=100.0)
        return float((client_statistics(h, y, CLASSES, settings, 0, client).spread - exact.spread).norm())

    assert error(1e4) < error(10.0) < error(0.1)
    assert error(10.0) == error(10.0)
    assert error(10.0) != error(10.0, client=1)
    assert epsilon_of_release(config(epsilon=2.0), [50, 900], DIM) == pytest.approx(2.0, rel=1e-6)
    assert epsilon_of_release(config(), [50], DIM) is None


def test_noise_can_drown_the_statistics_but_leaves_them_valid():
    h, y = rows(5)
    for statistics in ("means", "moments"):
        found = client_statistics(h, y, CLASSES, config(statistics=statistics, epsilon=0.01), 0, 0)
        assert float(found.shares.sum()) == pytest.approx(1, rel=1e-5)
        assert torch.linalg.eigvalsh(found.spread).min() >= -1e-3 * found.spread.norm()


def test_what_cannot_be_statistics_is_refused():
    good = to_state(client_statistics(*rows(), CLASSES, config(), 0, 0))
    with pytest.raises(RunError, match="lack spread"):
        from_state({key: value for key, value in good.items() if key != "spread"})
    with pytest.raises(RunError, match="NaN or infinity"):
        from_state({**good, "means": good["means"] * float("nan")})
    with pytest.raises(RunError, match="do not fit together"):
        from_state({**good, "spread": good["spread"][:2]})
    with pytest.raises(RunError, match="at least one row"):
        Statistics(0, torch.ones(1), torch.zeros(1, DIM), torch.eye(DIM))
    with pytest.raises(RunError, match="client 4 has no training rows"):
        client_statistics(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.long), CLASSES, config(), 0, 4)
