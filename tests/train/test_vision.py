from __future__ import annotations

import gzip
import hashlib
import importlib
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
