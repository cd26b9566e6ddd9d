from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import pickle
import shutil

import numpy as np
import pytest
from train.refusals import refused

from nmoe_train.data import datasets as data
from nmoe_train.data.datasets import load


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A mirror with a Fashion-MNIST of twenty images, and an empty data/ for the download."""
    from nmoe_train.vision import datasets

    utils = importlib.import_module("torchvision.datasets.utils")

    mirror, resources = tmp_path / "mirror", []
    mirror.mkdir()
    for part in ("train", "t10k"):
        images = np.array([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 2, 0, 0, 0, 3, *range(60)], np.uint8)
        labels = np.array([0, 0, 8, 1, 0, 0, 0, 10, *range(10)], np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(array.tobytes())
            resources.append((f"{part}-{name}-ubyte.gz", hashlib.md5(packed).hexdigest()))
            (mirror / resources[-1][0]).write_bytes(packed)
    # A response for file:// has no length, which torchvision's progress bar needs.
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, target: shutil.copy(url.removeprefix("file://"), target))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"file://{mirror}/"])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(data, "ROOT", tmp_path / "here/data")
    return mirror


def test_a_data_set_is_downloaded_once_and_prints_nothing_to_stdout(fashion, capsys):
    dataset = load("fashion-mnist")
    assert dataset.shape == (1, 2, 3)
    assert dataset.labels[1] == "Trouser"
    assert capsys.readouterr().out == ""
    assert [path.name for path in data.ROOT.iterdir()] == ["FashionMNIST"]
    for path in fashion.iterdir():
        path.unlink()
    assert load("fashion-mnist").fingerprint() == dataset.fingerprint()


def test_output_of_torchvision_goes_to_stderr(fashion, capsys, monkeypatch):
    from nmoe_train.vision import datasets

    download = datasets.FashionMNIST.download

    def print_and_download(self):
        print("Downloading")
        download(self)

    monkeypatch.setattr(datasets.FashionMNIST, "download", print_and_download)
    load("fashion-mnist")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Downloading" in shown.err


def test_a_failed_download_leaves_no_files_and_can_be_repeated(fashion):
    last = fashion / "t10k-labels-idx1-ubyte.gz"
    whole = last.read_bytes()
    for spoiled in (whole[:-5], None):
        if spoiled is None:
            last.unlink()
        else:
            last.write_bytes(spoiled)
        with refused(
            r"fashion-mnist is not in .*data/ and cannot be downloaded \(Error downloading t10k-labels.*Tried"
        ):
            load("fashion-mnist")
        assert list(data.ROOT.iterdir()) == []
    last.write_bytes(whole)
    assert load("fashion-mnist").shape == (1, 2, 3)


def test_an_interrupted_download_leaves_no_files(fashion, monkeypatch):
    from nmoe_train.vision import datasets

    def interrupted(self):
        (data.ROOT / next(data.ROOT.iterdir()) / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.FashionMNIST, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("fashion-mnist")
    assert list(data.ROOT.iterdir()) == []


def test_truncated_files_are_downloaded_again(fashion):
    fingerprint = load("fashion-mnist").fingerprint()
    for damage in (b"", b"\0", b"\0\0\x08\x03\0\0"):
        (data.ROOT / "FashionMNIST/raw/train-images-idx3-ubyte").write_bytes(damage)
        assert load("fashion-mnist").fingerprint() == fingerprint


def test_archives_copied_by_hand_are_used_without_a_network(fashion):
    (data.ROOT / "FashionMNIST").mkdir(parents=True)
    fashion.rename(data.ROOT / "FashionMNIST/raw")
    assert load("fashion-mnist").shape == (1, 2, 3)


def test_a_data_folder_that_cannot_be_created_is_reported_in_one_line(fashion):
    data.ROOT.parent.write_text("a file where a folder should be")
    for name in ("fashion-mnist", "cifar10"):
        with refused(
            rf"{name} is not in .*data/ and cannot be downloaded \(.*Not a directory.*\); copy it there, or use npz"
        ):
            load(name)


def idx(array, kind=8):
    """An array in the format of MNIST's files: big-endian, after a header of type and shape."""
    header = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


PIXELS = np.arange(20 * 28 * 28).reshape(20, 28, 28).astype(np.uint8)
TEN = np.arange(20, dtype=np.uint8) % 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, without a network."""
    utils = importlib.import_module("torchvision.datasets.utils")

    def no_network(url, *_args, **_kwargs):
        raise OSError(f"no network for {url}")

    monkeypatch.setattr(utils, "_urlretrieve", no_network)
    monkeypatch.setattr(utils, "_get_redirect_url", no_network)
    monkeypatch.setattr(data, "ROOT", tmp_path / "data")
    data.ROOT.mkdir()
    return data.ROOT


@pytest.mark.parametrize("name", ["MNIST", "KMNIST"])
def test_files_in_the_format_of_mnist_are_loaded(folder, name):
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS[:count]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(TEN[:count]))
    dataset = load(name.lower())
    assert (dataset.x_train[:, 0] == PIXELS).all()
    assert dataset.y_test.tolist() == list(range(10))
    assert dataset.labels[3] == {"MNIST": "3 - three", "KMNIST": "tsu"}[name]


def test_emnist_means_its_balanced_part(folder):
    raw = folder / "EMNIST/raw"
    raw.mkdir(parents=True)
    y = np.arange(47, dtype=np.uint8)
    for part in ("train", "test"):
        (raw / f"emnist-balanced-{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((47, 28, 28), np.uint8)))
        (raw / f"emnist-balanced-{part}-labels-idx1-ubyte").write_bytes(idx(y))
    assert len(load("emnist").labels) == 47


def test_the_class_of_a_sample_of_qmnist_is_the_first_of_its_numbers(folder):
    raw = folder / "QMNIST/raw"
    raw.mkdir(parents=True)
    labels = np.stack([TEN, *[np.full(20, 77)] * 7], 1).astype(">i4")
    for part in ("train", "test"):
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(PIXELS))
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(idx(labels, kind=12))
    assert load("qmnist").y_train.tolist() == TEN.tolist()


def test_usps_is_read_from_its_packed_text(folder):
    lines = [f"{label + 1} " + " ".join(f"{i + 1}:{2 * (i % 2) - 1}" for i in range(256)) for label in range(10)]
    for name in ("usps.bz2", "usps.t.bz2"):
        (folder / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    dataset = load("usps")
    assert dataset.x_test[0, 0, 0, :4].tolist() == [0, 255, 0, 255]
    assert dataset.labels == tuple("0123456789")


def test_svhn_is_read_from_matlab_files_and_its_label_ten_is_the_digit_zero(folder, monkeypatch):
    from nmoe_train.vision import datasets

    scipy_io = pytest.importorskip("scipy.io")
    splits = {}
    pixels = np.arange(32 * 32 * 3 * 20).reshape(32, 32, 3, 20).astype(np.uint8)
    for split in ("train", "test"):
        path = folder / f"{split}_32x32.mat"
        scipy_io.savemat(path, {"X": pixels, "y": np.where(TEN == 0, 10, TEN)[:, None]})
        splits[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    dataset = load("svhn")
    assert (dataset.x_train[5, 1] == pixels[:, :, 1, 5]).all()
    assert dataset.y_train.tolist() == TEN.tolist()


def test_stl10_is_read_from_its_binary_files(folder, monkeypatch):
    from nmoe_train.vision import datasets

    inside = folder / "stl10_binary"
    inside.mkdir()
    columns_first = np.zeros((20, 3, 96, 96), np.uint8)
    columns_first[:, :, 7, 2] = 9
    lists = {"train": [], "test": []}
    for split, name, array in (
        ("train", "train_X.bin", columns_first),
        ("train", "train_y.bin", TEN + 1),
        ("train", "unlabeled_X.bin", columns_first[:1]),
        ("test", "test_X.bin", columns_first),
        ("test", "test_y.bin", TEN + 1),
    ):
        (inside / name).write_bytes(array.tobytes())
        lists[split].append([name, hashlib.md5(array.tobytes()).hexdigest()])
    (inside / "class_names.txt").write_text("\n".join(f"kind {i}" for i in range(10)))
    monkeypatch.setattr(datasets.STL10, "train_list", lists["train"])
    monkeypatch.setattr(datasets.STL10, "test_list", lists["test"])
    dataset = load("stl10")
    assert (dataset.labels[1], dataset.x_test[0, 0, 2, 7]) == ("kind 1", 9)


def cifar_files(inside, monkeypatch, kind, label_key, classes):
    """Files like those of CIFAR, and torchvision's list of them with their digests.

    CIFAR's own format is a pickle, which torchvision reads after it has checked the digest.
    """
    inside.mkdir()
    y = [i % classes for i in range(2 * classes)]
    pixels = np.arange(len(y) * 3072).reshape(len(y), 3072).astype(np.uint8)
    names = [f"class {i}" for i in range(classes)]
    found = {}
    for name, content in (
        ("train", {"data": pixels, label_key: y}),
        ("test", {"data": pixels[:classes], label_key: y[:classes]}),
        ("meta", {kind.meta["key"]: names}),
    ):
        packed = pickle.dumps(content)
        (inside / name).write_bytes(packed)
        found[name] = [name, hashlib.md5(packed).hexdigest()]
    monkeypatch.setattr(kind, "train_list", [found["train"]])
    monkeypatch.setattr(kind, "test_list", [found["test"]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": found["meta"][1]})
    return pixels


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_loaded_with_its_class_names(folder, monkeypatch, name, classes):
    from nmoe_train.vision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    pixels = cifar_files(folder / kind.base_folder, monkeypatch, kind, key, classes)
    dataset = load(name)
    assert (dataset.x_train.reshape(-1, 3072) == pixels).all()
    assert dataset.labels[-1] == f"class {classes - 1}"
    (folder / kind.base_folder / "train").write_bytes(b"damaged")
    with refused(rf"{name} is not in .*data/ and cannot be downloaded \(.*no network"):
        load(name)


@pytest.mark.parametrize("name", data.TORCHVISION)
def test_every_named_set_that_is_missing_is_refused_in_one_line(folder, name):
    with refused(rf"{name} is not in .*data/ and cannot be downloaded"):
        load(name)
    assert list(folder.iterdir()) == []


def test_every_named_set_is_one_of_torchvision():
    from nmoe_train.vision import SETS

    assert set(SETS) == set(data.TORCHVISION)
