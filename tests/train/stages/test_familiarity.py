from __future__ import annotations

import numpy as np
import pytest

from nmoe_train.stages.familiarity import DIRECTIONS, familiar_latents


def client(rows=200, dim=6, seed=0, centre=3.0):
    """Latents of two classes around ± centre on the first axis; the second axis varies four times as much as others."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, rows)
    h = random.normal(0, 1, (rows, dim))
    h[:, 1] *= 4
    h[:, 0] += np.where(y, centre, -centre)
    return h.astype(np.float32), y


def test_own_latents_are_about_as_far_away_as_there_are_directions():
    h, y = client(2000)
    distances = familiar_latents(h, y).distances(client(500, seed=1)[0])
    assert distances.mean() == pytest.approx(6, rel=0.2)


def test_another_place_is_far_away_and_what_varies_much_counts_less():
    found = familiar_latents(*client(2000))
    base = np.array([[3.0, 0, 0, 0, 0, 0]], np.float32)
    along_quiet, along_loud = base.copy(), base.copy()
    along_quiet[0, 2] += 6
    along_loud[0, 1] += 6
    assert found.distances(base) < 0.5
    assert found.distances(along_quiet) > 5 * found.distances(along_loud)
    between = np.zeros((1, 6), np.float32)
    assert found.distances(between) > 4, "between two classes is in neither"


def test_classes_the_client_lacks_have_no_centre():
    h, y = client()
    assert familiar_latents(h, 3 * y).centres.shape == (2, 6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_client_of_few_rows_has_finite_statistics(rows):
    h, _ = client(rows)
    for y in (np.zeros(rows, int), np.arange(rows)):
        found = familiar_latents(h, y)
        assert np.isfinite(found.distances(h)).all()
        assert found.distances(h + 100).min() > found.distances(h).max()


def test_equal_latents_have_finite_statistics():
    h = np.ones((20, 6), np.float32)
    found = familiar_latents(h, np.zeros(20, int))
    assert found.distances(h) == pytest.approx(np.zeros(20), abs=1e-3)
    assert found.distances(h + 1).min() > 1


def test_many_directions_are_cut_to_those_that_vary_most():
    random = np.random.default_rng(0)
    h = random.normal(0, 0.01, (300, 100)).astype(np.float32)
    h[:, :DIRECTIONS] *= 100
    found = familiar_latents(h, np.zeros(300, int))
    assert found.whitening.shape == (100, DIRECTIONS)
    assert np.abs(found.whitening[DIRECTIONS:]).max() < 0.2 * np.abs(found.whitening[:DIRECTIONS]).max()
    assert found.distances(h).mean() == pytest.approx(DIRECTIONS, rel=0.3)
