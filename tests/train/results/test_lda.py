from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from nmoe_train.results.lda import best_fit, fit, statistics


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    return torch.randn(300, 5, generator=g) @ torch.randn(5, 5, generator=g) + 1.5 * y[:, None], y


def test_lda_from_the_sums_of_clients_is_that_of_all_samples_in_one_place(rows):
    h, y = rows
    parts = [statistics(h[i::4], y[i::4], 3) for i in range(4)]
    ours = fit(sum(parts[1:], start=parts[0]), 1e-9).scores(h).softmax(1)
    theirs = LinearDiscriminantAnalysis("lsqr", priors=np.full(3, 1 / 3)).fit(h.numpy(), y.numpy()).predict_proba(h)
    assert np.allclose(ours, theirs, atol=1e-4)


def test_latents_with_a_singular_covariance_and_classes_without_samples_are_fine(rows):
    h, y = rows
    flat = torch.cat([h, h.sum(1, keepdim=True), torch.zeros(len(h), 1)], 1)
    p = fit(statistics(flat, y, 5), 0.01).scores(flat).softmax(1)
    assert torch.isfinite(p).all()
    assert (p[:, 3:] == 0).all()
    same = fit(statistics(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), 2), 0.1).scores(torch.ones(1, 2))
    assert torch.isfinite(same).all()


def test_held_out_rows_choose_the_shrinkage(rows):
    h, y = rows
    total = statistics(h[:20], y[:20], 3)
    classifier, chosen = best_fit(total, [(h[100:200], y[100:200]), (h[200:], y[200:])])
    right = {s: int((fit(total, s).scores(h[100:]).argmax(1) == y[100:]).sum()) for s in (0.01, 0.03, 0.1, 0.3)}
    assert right[chosen] == max(right.values())
    assert torch.equal(classifier.weight, fit(total, chosen).weight)
