from __future__ import annotations

import numpy as np
import pytest
import torch

from nmoe_train.data.partition import EXAMPLES, class_counts, counts_for_size, draw_samples, largest_size
from nmoe_train.errors import DataError
from nmoe_train.results.evaluation import accuracy, auc, macro_f1

LABELS = np.repeat(np.arange(10), 200)
SKEWED = ("noniid:0", "noniid:1e-320", "noniid-text:0", "dirichlet:1e-3", "dirichlet:1e-6", "classes:1")
EVEN = ("noniid-text:0.9", "dirichlet:1e6")


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (1, 10), (2, 2), (2, 100), (7, 10), (13, 3), (1024, 10)])
@pytest.mark.parametrize("partition", [*EXAMPLES, *SKEWED, *EVEN])
def test_every_split_gives_each_client_its_size_and_shares_no_sample(partition, clients, classes):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), max(40, 8192 // classes)))
    size = largest_size(y, partition, clients, classes, seed=3)
    counts = class_counts(partition, clients, classes, size, seed=3)
    assert counts.dtype == np.int64
    assert counts.min() >= 0
    assert (counts.sum(1) == size).all()
    parts = draw_samples(y, counts, seed=3)
    assert len(set(np.concatenate(parts).tolist())) == clients * size
    for part, expected in zip(parts, counts, strict=True):
        assert np.array_equal(np.bincount(y[part], minlength=classes), expected)


@pytest.mark.parametrize("partition", [*EXAMPLES, *SKEWED, *EVEN])
@pytest.mark.parametrize("size", [1, 2, 9, 10**9])
def test_counts_are_not_negative_and_sum_to_the_size(partition, size):
    counts = class_counts(partition, 11, 7, size, seed=0)
    assert counts.min() >= 0
    assert (counts.sum(1) == size).all()


@pytest.mark.parametrize("partition", EXAMPLES)
def test_a_split_depends_on_the_seed_only(partition):
    def parts(seed):
        return draw_samples(LABELS, class_counts(partition, 5, 10, 20, seed), seed)

    assert all(np.array_equal(a, b) for a, b in zip(parts(1), parts(1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts(1), parts(2), strict=True))


@pytest.mark.parametrize("partition", [*EXAMPLES, *SKEWED])
def test_no_size_above_the_largest_size_fits(partition):
    def fits(size):
        return (class_counts(partition, 7, 10, size, seed=5).sum(0) <= 200).all()

    size = largest_size(LABELS, partition, 7, 10, seed=5)
    assert fits(size)
    assert not any(fits(larger) for larger in range(size + 1, len(LABELS) // 7 + 1))
    assert largest_size(LABELS, partition, 7, 10, seed=5, max_size=4) == 4


@pytest.mark.parametrize(("tau", "size"), [("0.5", 1500), ("0.3", 1300), ("0.2", 1200)])
def test_the_dominant_share_is_one_over_one_plus_tau(tau, size):
    counts = class_counts(f"noniid:{tau}", 10, 10, size, seed=0)
    assert counts.diagonal().tolist() == [1000] * 10
    assert (
        np.abs(counts - counts.diagonal() * np.eye(10) - (size - 1000) / 9).max(
            where=~np.eye(10, dtype=bool), initial=0
        )
        < 1
    )


def test_noniid_text_uses_the_share_of_the_papers_text():
    assert class_counts("noniid-text:0.3", 10, 10, 1000, seed=0).diagonal().tolist() == [700] * 10


@pytest.mark.parametrize("alpha", [1e-2, 0.3, 1, 50])
def test_class_mixes_have_the_mean_and_variance_of_a_dirichlet_distribution(alpha):
    """The marginals of Dirichlet(α) have the mean 1/K and the variance (K-1) / K² / (Kα+1)."""
    clients, classes = 20_000, 5
    size = 10**6
    mixes = class_counts(f"dirichlet:{alpha}", clients, classes, size, seed=0) / size
    variance = (classes - 1) / classes**2 / (classes * alpha + 1)
    assert np.allclose(mixes.mean(0), 1 / classes, atol=5 * (variance / clients) ** 0.5)
    assert np.allclose(mixes.var(0), variance, rtol=0.05)


def test_a_tiny_dirichlet_parameter_gives_one_class_per_client_and_a_huge_one_equal_mixes():
    assert (class_counts("dirichlet:1e-6", 50, 10, 100, seed=0).max(1) == 100).all()
    assert np.ptp(class_counts("dirichlet:1e6", 50, 10, 100, seed=0)) <= 2


@pytest.mark.parametrize(
    ("partition", "size", "percents"),
    [
        ("noniid:0.5", 1500, (66.66, 8.00)),
        ("noniid:0.3", 1300, (76.92, 8.69)),
        ("noniid:0.2", 1200, (83.33, 9.09)),
        ("iid", 1000, (10.0, 1.81)),
    ],
)
def test_a_constant_predictor_reaches_the_figures_of_the_paper(partition, size, percents):
    """The local classifier of the paper's table is a constant predictor; its figures reveal the dominant share."""
    truncated = [np.floor(value * 1e4 + 1e-6) / 100 for value in constant_predictor(partition, size)]
    assert truncated == [*percents, 50.0]


def constant_predictor(partition, size):
    """Accuracy, macro F1 and AUC of always predicting the dominant class, the mean over ten clients."""
    y_all = np.repeat(np.arange(10), 3000)
    measured = []
    for client, part in enumerate(draw_samples(y_all, class_counts(partition, 10, 10, size, seed=0), seed=0)):
        y = torch.from_numpy(y_all[part])
        p = torch.zeros(len(y), 10)
        p[:, client] = 1
        measured.append((accuracy(p, y), macro_f1(p.argmax(1), y, 10), auc(p, y)))
    return np.mean(measured, axis=0)


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        ("bogus", "unknown partition 'bogus'"),
        ("", "unknown partition ''"),
        (":", "unknown partition ':'"),
        ("iid:1", "unknown partition 'iid:1'"),
        ("iid:" + "1" * 9999, "unknown partition 'iid:1111"),
        ("noniid", "unknown partition 'noniid'"),
        ("noniid:x", "'noniid:x' does not end in a finite number"),
        ("noniid:0.5:0.5", "does not end in a finite number"),
        ("noniid:1\n2", "does not end in a finite number"),
        ("noniid:-1", "τ must be in 0..1"),
        (
            "noniid:1.01",
            "noniid:1.01: τ must be in 0..1; the paper's share of the own class, 1-τ, has no meaning outside",
        ),
        ("noniid-text:2", "τ must be in 0..1"),
        ("noniid-text:1", "over 0 and at most 1"),
        ("noniid-text:-0.1", "τ must be in 0..1"),
        ("dirichlet:0", "must lie in 1e-6..1e6"),
        ("dirichlet:-1", "must lie in 1e-6..1e6"),
        ("dirichlet:1e-400", "must lie in 1e-6..1e6"),
        ("dirichlet:1e9", "dirichlet:1e\\+09: the number must lie in 1e-6..1e6"),
        ("classes:11", "whole number in 1..10"),
        ("classes:1.5", "whole number in 1..10"),
        ("classes:-2", "whole number in 1..10"),
        ("classes:1." + "0" * 5000 + "1x", "does not end in a finite number"),
        *[
            (f"{kind}:{value}", "does not end in a finite number")
            for kind in ("noniid", "noniid-text", "dirichlet", "classes")
            for value in ("nan", "inf", "-inf", "1e400", "1" * 5000)
        ],
    ],
)
def test_an_impossible_partition_is_refused_in_one_line(partition, text):
    with pytest.raises(DataError, match=text) as refused:
        class_counts(partition, 10, 10, 100, seed=0)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


def test_too_few_samples_of_a_class_are_reported_with_their_number():
    with pytest.raises(DataError, match=r"needs 400 training samples of class 0, but there are 200; .*data.train_size"):
        draw_samples(LABELS, class_counts("iid", 10, 10, 400, seed=0), seed=0)
    with pytest.raises(DataError, match=r"needs 400 training samples of class 0, but there are 200; .*data.clients"):
        counts_for_size(LABELS, "iid", 10, 10, wanted=400, usual=None, seed=0)


@pytest.mark.parametrize(
    ("labels", "clients", "partition", "text"),
    [
        (LABELS[::40], 100, "iid", "iid among 100 clients leaves 0 of 50 training samples per client"),
        (LABELS[::40], 50, "iid", "leaves 1 of 50"),
        (LABELS[:-200], 10, "iid", r"class 9 has 0\). Lower data.clients"),
        (np.repeat([0, 1], [100, 1]), 20, "dirichlet:1e-3", "dirichlet:1e-3 among 20 clients leaves 0 of 101"),
    ],
)
def test_a_split_that_leaves_a_client_fewer_than_two_samples_is_refused(labels, clients, partition, text):
    with pytest.raises(DataError, match=text):
        largest_size(labels, partition, clients, 10, seed=0)


def test_a_split_has_the_wanted_size_or_else_the_largest_up_to_the_usual_one():
    def size(wanted, usual):
        (only,) = set(counts_for_size(LABELS, "noniid:0.5", 10, 10, wanted, usual, seed=0).sum(1))
        return only

    largest = largest_size(LABELS, "noniid:0.5", 10, 10, seed=0)
    assert size(None, None) == largest
    assert size(None, 30) == 30
    assert size(None, 10**6) == largest
    assert size(25, 30) == 25
    assert size(1, None) == 1
