from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from train.refusals import assert_survives_damage, refused

from nmoe_train.data.datasets import MAX_CLASSES, Dataset, load


def test_the_digits_can_be_shared_by_ten_clients():
    digits = load("digits")
    assert np.bincount(digits.y_train).tolist() == [120] * 10
    assert len(digits.y_train) + len(digits.y_test) == 1797
    assert digits.fingerprint() == load("digits").fingerprint()


@pytest.mark.parametrize("name", ["mnists", "", "npz:", "folder:", "npz", ":x", "digits:1", "mni\nst", "Mnist"])
def test_an_unknown_name_is_refused_with_a_list_of_the_data_sets(name):
    with refused("expected one of digits, .*npz:FILE, folder:DIR"):
        load(name)


@pytest.mark.parametrize("shape", [(50, 300, 8, 9), (3, 1, 1, 1), (2, 3, 1200, 1100)])
def test_statistics_are_mean_and_deviation_of_the_pixels(shape):
    """With 300 channels an error of 1e-6 would change the rounded fourth digit of at least one."""
    x = (np.random.default_rng(0).random(shape) ** 2 * 255).astype(np.uint8)
    y = np.arange(len(x)) % 2
    mean, deviation = Dataset("any", x, y, x, y, ("a", "b")).statistics()
    assert mean == (x / 255).mean((0, 2, 3)).round(4).tolist()
    assert deviation == (x / 255).std((0, 2, 3)).round(4).tolist()


def test_a_constant_channel_gets_a_deviation_of_a_thousandth():
    x = np.zeros((4, 3, 2, 2), np.uint8)
    x[:, 1], x[0, 2] = 255, 255
    statistics = Dataset("any", x, np.arange(4) % 2, x, np.arange(4) % 2, ("a", "b")).statistics()
    assert statistics == ([0.0, 1.0, 0.25], [0.001, 0.001, 0.433])


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


def test_an_npz_is_loaded_with_channels_first(tmp_path):
    dataset = load(npz(tmp_path / "mine.npz", classes=np.array(["a", "b", "c", "d"]), more=np.array([object()])))
    assert (dataset.name, dataset.shape) == ("mine", (3, 8, 8))
    assert dataset.labels == ("a", "b", "c", "d")
    assert load(
        npz(tmp_path / "grey.npz", x_train=np.zeros((4, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
    ).shape == (1, 8, 8)
    dataset = load(npz(tmp_path / "mine.npz", y_train=np.arange(4, dtype=np.uint64), classes=np.arange(10, 14)))
    assert (dataset.y_train.dtype, dataset.labels) == (np.int64, ("10", "11", "12", "13"))


def test_a_tilde_in_the_path_of_an_npz_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    npz(tmp_path / "mine.npz")
    assert load("npz:~/mine.npz").name == "mine"


def medmnist(path, **changes):
    """A file like MedMNIST's, with labels of shape (n, 1)."""
    arrays = {}
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = np.full((count, 28, 28, 3), count, np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 3)[:, None].astype(np.uint8)
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return f"npz:{path}"


def test_a_file_of_medmnist_is_loaded_as_it_is_and_its_validation_samples_are_training_samples(tmp_path):
    dataset = load(medmnist(tmp_path / "pathmnist.npz"))
    assert (dataset.name, dataset.shape, len(dataset.x_test)) == ("pathmnist", (3, 28, 28), 3)
    assert dataset.x_train[:, 0, 0, 0].tolist() == [6] * 6 + [2] * 2
    assert dataset.y_train.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    grey = {f"{part}_images": np.zeros((n, 28, 28), np.uint8) for part, n in (("train", 6), ("val", 2), ("test", 3))}
    assert load(medmnist(tmp_path / "grey.npz", **grey)).shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"val_labels": None}, "val_labels is missing; a file of MedMNIST has train, val and test"),
        ({"test_images": None}, "test_images is missing"),
        ({"val_images": np.zeros((2, 9, 9, 3), np.uint8)}, "its arrays do not fit together"),
        ({"train_labels": np.zeros((6, 14), np.uint8), "val_labels": np.zeros((2, 14), np.uint8)}, "has 14 labels"),
        ({"test_labels": np.zeros((3, 1))}, "labels must be integers, but y_test is float64"),
        ({"test_labels": np.zeros((2, 1), np.uint8)}, r"test labels have shape \(2,\)"),
        ({"test_labels": np.array(1)}, "do not fit together"),
        ({"train_images": np.array([object()] * 6)}, "cannot be read"),
    ],
)
def test_a_file_of_medmnist_that_does_not_fit_is_refused_in_one_line(tmp_path, change, text):
    with refused(text):
        load(medmnist(tmp_path / "mine.npz", **change))


FOUR = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_train": None}, "x_train is missing; the file needs x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((4, 8, 8, 3))}, "train images are float64"),
        ({"x_train": np.zeros((4, 8), np.uint8)}, "train images are uint8"),
        ({"x_train": np.zeros((), np.uint8)}, "train images are uint8"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.arange(0)}, "train images are uint8"),
        ({"x_train": np.zeros((4, 0, 8, 3), np.uint8)}, "train images are uint8"),
        ({"x_test": np.zeros((2, 8, 0), np.uint8)}, "test images are uint8"),
        ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, "train images are .* test images"),
        ({"y_train": np.arange(3)}, r"train labels have shape \(3,\); expected \(4,\), one label per image"),
        ({"y_train": np.arange(4)[:, None]}, r"train labels have shape \(4, 1\)"),
        ({"y_test": np.array(1)}, r"test labels have shape \(\)"),
        ({"y_train": np.array([0, 1, 2, -1])}, "train labels must lie in 0..2"),
        ({"y_train": np.array(FOUR)}, "labels must be integers, but y_train is <U1"),
        ({"y_train": np.arange(4.0)}, "labels must be integers, but y_train is float64"),
        ({"y_test": np.array([True, False])}, "labels must be integers, but y_test is bool"),
        ({"y_train": np.array([object()] * 4)}, "cannot be read"),
        ({"y_train": np.array([0, 1, 3, 3])}, "class 2 has no training sample"),
        ({"y_test": np.array([0, 4])}, "class 4 has no training sample"),
        ({"y_train": np.zeros(4, int), "y_test": np.zeros(2, int)}, "number of classes is 1; it must be in 2..4096"),
        ({"y_train": np.array([0, 1, 2, 10**7])}, "a label is 10000000; .* K is at most 4096"),
        ({"y_train": np.array([0, 1, 2, 2**64 - 1], np.uint64)}, "a label is 18446744073709551615"),
        ({"classes": np.array("cat")}, r"classes is <U3 \(\); it must be a list of names"),
        ({"classes": np.array([FOUR])}, r"classes is <U1 \(1, 4\); it must be a list of names"),
        ({"classes": np.array([b"a", b"b", b"c", b"d"])}, r"classes is \|S1 \(4,\)"),
        ({"classes": np.arange(4.0)}, r"classes is float64 \(4,\)"),
        ({"classes": np.array(FOUR[:3])}, "a label is 3, but classes has only 3 names"),
        ({"classes": np.array([*FOUR, "e"])}, "class 4 has no training sample"),
        ({"classes": np.array(["a", "b", "c", "a"])}, "2 classes have the name 'a'"),
        ({"classes": np.array(["a", "b\nc", "c", "d"])}, "name of class 1, .*cannot be printed"),
        ({"classes": np.array(["a", "b", "\x1b[2J", "d"])}, "name of class 2, .*cannot be printed"),
        ({"classes": np.array(["a", "b", "", "d"])}, "name of class 2 is empty; give it one"),
        ({"classes": np.array([str(i) for i in range(MAX_CLASSES + 1)])}, "number of classes is 4097"),
    ],
)
def test_an_npz_with_wrong_shapes_dtypes_or_names_is_refused_in_one_line(tmp_path, change, text):
    with refused(text):
        load(npz(tmp_path / "mine.npz", **change))


def test_a_file_that_is_missing_damaged_or_not_an_npz_is_refused_in_one_line(tmp_path):
    with refused("nowhere.npz: cannot be read as an .npz: No such file"):
        load(f"npz:{tmp_path}/nowhere.npz")
    with refused("cannot be read as an .npz: Is a directory"):
        load(f"npz:{tmp_path}")
    with refused("cannot be read as an .npz: embedded null"):
        load(f"npz:{tmp_path}/a\0b")
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("no archive at all")
    for name in ("one.npy", "empty.npz", "text.npz"):
        with refused("not a complete archive of named arrays"):
            load(f"npz:{tmp_path}/{name}")
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    with refused("x_train is missing"):
        load(f"npz:{tmp_path}/nothing.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", "no array")
    with refused("labels must be integers"):
        load(f"npz:{tmp_path}/other.npz")


def test_a_data_set_with_an_unprintable_name_is_refused(tmp_path):
    with refused("cannot be printed; rename it"):
        load(npz(tmp_path / "a\tb.npz"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_npz_is_loaded_or_raises_dataerror(tmp_path, compression):
    whole = io.BytesIO()
    npz(tmp_path / "whole.npz", classes=np.array(FOUR))
    with zipfile.ZipFile(tmp_path / "whole.npz") as plain, zipfile.ZipFile(whole, "w", compression) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert_survives_damage(whole.getvalue(), tmp_path / "mine.npz", lambda path: load(f"npz:{path}"), 200)


@pytest.mark.parametrize("key", ["x_train", "y_test", "classes"])
def test_an_npz_with_a_damaged_array_is_loaded_or_raises_dataerror(tmp_path, key):
    np.save(whole := io.BytesIO(), {"x_train": np.zeros((4, 2, 2), np.uint8), "classes": FOUR}.get(key, np.arange(2)))

    def read(path):
        npz(tmp_path / "mine.npz", **{key: None})
        with zipfile.ZipFile(tmp_path / "mine.npz", "a") as archive:
            archive.write(path, f"{key}.npy")
        load(f"npz:{tmp_path}/mine.npz")

    assert_survives_damage(whole.getvalue(), tmp_path / "array", read, 200)


def test_images_of_one_single_colour_are_refused_but_one_constant_channel_is_not():
    digits = load("digits")
    grey = replace(digits, x_train=np.full_like(digits.x_train, 7))
    with refused("all training images are the same single colour, so there is nothing to learn from"):
        grey.statistics()
    red = np.concatenate([digits.x_train, np.zeros_like(digits.x_train)], 1)
    _, deviation = replace(digits, x_train=red, x_test=np.repeat(digits.x_test, 2, 1)).statistics()
    assert deviation[1] == 0.001
