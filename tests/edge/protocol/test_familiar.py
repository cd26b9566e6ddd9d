from __future__ import annotations

import numpy as np
import pytest

from nmoe_edge.protocol.familiar import MAX_CENTRES, MAX_DIRECTIONS, Familiar


def familiar(d=12, r=5, c=3, seed=0):
    random = np.random.default_rng(seed)
    return Familiar(random.normal(size=(d, r)).astype(np.float32), random.normal(size=(c, r)).astype(np.float32))


def test_the_distance_is_the_squared_one_from_the_nearest_centre():
    it = familiar()
    latents = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)
    differences = (latents @ it.whitening)[:, None, :] - it.centres  # (n, c, r)
    assert it.distances(latents) == pytest.approx((differences.astype(np.float64) ** 2).sum(2).min(1), rel=1e-5)


def test_a_centre_is_at_distance_zero_and_never_below():
    it = Familiar(np.eye(4, dtype=np.float32), 1000 * np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    distances = it.distances(it.centres)
    assert (distances >= 0).all()
    assert distances == pytest.approx(np.zeros(9), abs=1e-6)


def test_rows_far_from_every_class_are_further_than_rows_of_a_class():
    it = familiar()
    near = it.centres @ np.linalg.pinv(it.whitening)
    assert it.distances(near).max() < 1e-6 < it.distances(near + 3).min()


def test_no_rows_have_no_distances():
    assert familiar().distances(np.zeros((0, 12), np.float32)).shape == (0,)


@pytest.mark.parametrize("value", [1e38, np.inf, -np.inf, np.nan])
def test_a_latent_too_large_to_measure_is_infinitely_far(value):
    latents = np.full((1, 12), value, np.float32)
    assert familiar().distances(latents).tolist() == [np.inf] or familiar().distances(latents)[0] > 1e70


@pytest.mark.parametrize(
    ("whitening", "centres", "why"),
    [
        (np.zeros((4, 2)), np.zeros((1, 2), np.float32), "float64"),
        (np.zeros((4, 2), np.float32), np.zeros((1, 3), np.float32), "2 columns"),
        (np.zeros(4, np.float32), np.zeros((1, 4), np.float32), "two dimensions"),
        (np.zeros((4, 0), np.float32), np.zeros((1, 0), np.float32), "two dimensions"),
        (np.zeros((4, 2), np.float32), np.zeros((0, 2), np.float32), "two dimensions"),
        (np.full((4, 2), np.nan, np.float32), np.zeros((1, 2), np.float32), "whitening contains NaN"),
        (np.zeros((4, 2), np.float32), np.full((1, 2), np.inf, np.float32), "centres contains NaN"),
        (np.zeros((4, MAX_DIRECTIONS + 1), np.float32), np.zeros((1, MAX_DIRECTIONS + 1), np.float32), "directions"),
        (np.zeros((4, 2), np.float32), np.zeros((MAX_CENTRES + 1, 2), np.float32), "centres, more"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(whitening, centres, why):
    with pytest.raises(ValueError, match=why):
        Familiar(whitening, centres)
