from __future__ import annotations

import numpy as np
import pytest
import torch

from nmoe_train.data import load
from nmoe_train.errors import DataError
from nmoe_train.evaluate import accuracy, auc, macro_f1
from nmoe_train.partition import EXAMPLES, class_counts, largest_size, split

LABELS = np.repeat(np.arange(10), 200)


@pytest.mark.parametrize("partition", EXAMPLES)
def test_every_split_gives_each_client_its_size_and_shares_no_sample(partition):
    size = largest_size(LABELS, partition, 7, 10, seed=3)
    counts = class_counts(partition, 7, 10, size, seed=3)
    assert (counts.sum(1) == size).all()
    parts = split(LABELS, counts, seed=3)
    assert len(set(np.concatenate(parts).tolist())) == 7 * size
    for part, due in zip(parts, counts, strict=True):
        assert np.array_equal(np.bincount(LABELS[part], minlength=10), due)


@pytest.mark.parametrize("partition", EXAMPLES)
def test_a_split_is_its_seeds(partition):
    def parts(seed):
        return split(LABELS, class_counts(partition, 5, 10, 20, seed), seed)

    assert all(np.array_equal(a, b) for a, b in zip(parts(1), parts(1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts(1), parts(2), strict=True))


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


def test_the_papers_text_has_another_share():
    assert class_counts("noniid-text:0.3", 10, 10, 1000, seed=0).diagonal().tolist() == [700] * 10


@pytest.mark.parametrize(
    ("partition", "size", "percents"),
    [
        ("noniid:0.5", 1500, (66.66, 8.00)),
        ("noniid:0.3", 1300, (76.92, 8.69)),
        ("noniid:0.2", 1200, (83.33, 9.09)),
        ("iid", 1000, (10.0, 1.81)),
    ],
)
def test_a_constant_predictor_gets_the_papers_figures(partition, size, percents):
    """Its table's local classifier is one, which is how the dominant share is known."""
    truncated = [np.floor(value * 1e4 + 1e-6) / 100 for value in constant_predictor(partition, size)]
    assert truncated == [*percents, 50.0]


def constant_predictor(partition, size):
    """Accuracy, macro F1 and AUC of always saying the dominant class, the mean over ten clients."""
    y_all = np.repeat(np.arange(10), 3000)
    measured = []
    for client, part in enumerate(split(y_all, class_counts(partition, 10, 10, size, seed=0), seed=0)):
        y = torch.from_numpy(y_all[part])
        p = torch.zeros(len(y), 10)
        p[:, client] = 1
        measured.append((accuracy(p, y), macro_f1(p.argmax(1), y, 10), auc(p, y)))
    return np.mean(measured, axis=0)


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        ("bogus", "no split is called 'bogus'"),
        ("iid:1", "no split is called 'iid:1'"),
        ("noniid", "no split is called 'noniid'"),
        ("noniid:x", "'x' in 'noniid:x' is no number"),
        ("noniid:-1", "less than 0"),
        ("noniid-text:1", "not in 0..1"),
        ("dirichlet:0", "over 0"),
        ("classes:11", "1 to 10 classes"),
        ("classes:1.5", "1 to 10 classes"),
    ],
)
def test_a_split_that_cannot_be_is_refused(partition, text):
    with pytest.raises(DataError, match=text):
        class_counts(partition, 10, 10, 100, seed=0)


def test_too_few_samples_of_a_class_are_said_with_their_number():
    with pytest.raises(DataError, match=r"needs 400 samples of class 0, but there are 200"):
        split(LABELS, class_counts("iid", 10, 10, 400, seed=0), seed=0)
    with pytest.raises(DataError, match="without a sample"):
        largest_size(LABELS[:50], "iid", 100, 10, seed=0)


def test_the_digits_can_be_shared_by_ten_clients():
    digits = load("digits")
    assert np.bincount(digits.y_train).tolist() == [120] * 10
    assert len(digits.y_train) + len(digits.y_test) == 1797
    assert digits.fingerprint() == load("digits").fingerprint()


def npz(path, **changes):
    arrays = {
        "x_train": np.zeros((4, 8, 8, 3), np.uint8),
        "y_train": np.arange(4),
        "x_test": np.zeros((2, 8, 8, 3), np.uint8),
        "y_test": np.arange(2),
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return f"npz:{path}"


def test_anybodys_npz_is_read_with_channels_first(tmp_path):
    dataset = load(npz(tmp_path / "mine.npz", classes=np.array(["a", "b", "c", "d"])))
    assert dataset.shape == (3, 8, 8)
    assert dataset.labels == ("a", "b", "c", "d")
    assert load(
        npz(tmp_path / "grey.npz", x_train=np.zeros((4, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
    ).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_train": None}, "holds no x_train"),
        ({"x_train": np.zeros((4, 8, 8, 3))}, "train images are float64"),
        ({"x_train": np.zeros((4, 8), np.uint8)}, "train images are uint8"),
        ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, "test images"),
        ({"y_train": np.arange(3)}, "train labels"),
        ({"y_train": np.array([0, 1, 2, -1])}, "train labels"),
        ({"y_train": np.array(["a", "b", "c", "d"])}, "labels are whole numbers"),
        ({"y_train": np.array([object()] * 4)}, "cannot be read"),
    ],
)
def test_an_npz_of_other_shapes_or_dtypes_is_one_line(tmp_path, change, text):
    with pytest.raises(DataError, match=text):
        load(npz(tmp_path / "mine.npz", **change))


def test_a_missing_file_and_an_unknown_name_are_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load(f"npz:{tmp_path}/nowhere.npz")
    with pytest.raises(DataError, match="there are digits"):
        load("mnist")
