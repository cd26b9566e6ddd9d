"""Data sets as uint8 arrays in memory. Knows nothing of clients; partition.py does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmoe_train.errors import DataError

NAMES = ("digits", "cifar10", "fashion-mnist", "npz:FILE")
ROOT = Path("data")
"""Where torchvision's data sets are looked for, and fetched to."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images and what they show, split into train and test once and for all."""

    name: str
    x_train: NDArray[np.uint8]
    """(n, C, H, W)"""
    y_train: NDArray[np.int64]
    """(n,)"""
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise DataError(f"{self.name}: {len(self.labels)} class; there is nothing to tell apart")
        for x, y, what in ((self.x_train, self.y_train, "train"), (self.x_test, self.y_test, "test")):
            if x.dtype != np.uint8 or x.ndim != 4 or len(x) == 0:
                raise DataError(f"{self.name}: {what} images are {x.dtype} {x.shape}, not uint8 (n, C, H, W)")
            if y.shape != (len(x),):
                raise DataError(f"{self.name}: {len(y)} {what} labels for {len(x)} images")
            if y.min() < 0 or y.max() >= len(self.labels):
                raise DataError(f"{self.name}: {what} labels are not one of 0..{len(self.labels) - 1} an image")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"{self.name}: train images are {self.x_train.shape[1:]}, test images {self.x_test.shape[1:]}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.x_train.shape[1:]

    def fingerprint(self) -> str:
        """sha256 of every image and label."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def load(name: str) -> Dataset:
    """A data set by name; DataError says what to do when it is not to be had."""
    if name == "digits":
        return _digits()
    if name in ("cifar10", "fashion-mnist"):
        return _torchvision(name)
    if name.startswith("npz:"):
        return _npz(Path(name.removeprefix("npz:")))
    raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")


def _digits() -> Dataset:
    """scikit-learn's 1797 digits of 8 × 8: 120 of each class to train with, so that ten clients can share them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images * 15).astype(np.uint8)[:, None]  # 0..16 -> 0..240
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(y))
    rank = np.zeros(len(y), np.int64)  # of each sample within its class
    for label in range(10):
        mine = order[y[order] == label]
        rank[mine] = np.arange(len(mine))
    train, test = order[rank[order] < 120], order[rank[order] >= 120]
    return Dataset("digits", x[train], y[train], x[test], y[test], tuple(map(str, range(10))))


def _npz(path: Path) -> Dataset:
    """x_train, y_train, x_test, y_test and perhaps classes; images are (n, H, W), (n, H, W, C) or (n, C, H, W)."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("one array, not several by name")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as an .npz: {reason}") from error
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(f"{path}: holds no {missing[0]}; it needs x_train, y_train, x_test, y_test")
    if any(arrays[key].dtype.kind not in "ui" for key in ("y_train", "y_test")):
        raise DataError(f"{path}: labels are whole numbers, not {arrays['y_train'].dtype}")
    y_train, y_test = (arrays[key].astype(np.int64) for key in ("y_train", "y_test"))
    count = int(max(y_train.max(), y_test.max())) + 1 if y_train.size and y_test.size else 0
    labels = tuple(map(str, arrays["classes"].tolist())) if "classes" in arrays else tuple(map(str, range(count)))
    return Dataset(
        path.stem, _channels_first(arrays["x_train"]), y_train, _channels_first(arrays["x_test"]), y_test, labels
    )


def _channels_first(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _torchvision(name: str) -> Dataset:
    from nmoe_train.vision import datasets

    kind = {"cifar10": datasets.CIFAR10, "fashion-mnist": datasets.FashionMNIST}[name]
    try:
        train, test = (kind(ROOT, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name} is not in {ROOT}/ and cannot be fetched ({reason}); bring it, or use npz:FILE"
        ) from error
    parts = [(_channels_first(np.asarray(p.data)), np.asarray(p.targets, np.int64)) for p in (train, test)]
    return Dataset(name, *parts[0], *parts[1], tuple(train.classes))
