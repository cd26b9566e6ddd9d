"""Data sets as uint8 arrays in memory. Knows nothing of clients; partition.py does."""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nmoe_train.errors import DataError

NAMES = ("digits", "cifar10", "fashion-mnist", "npz:FILE", "folder:DIR")
ROOT = Path("data")
"""Where torchvision's data sets are looked for, and fetched to."""
MAX_CLASSES = 4096
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
_LAYOUT = "a data set is DIR/train/CLASS/*.png and DIR/test/CLASS/*.png"
_DAMAGED = (
    *(OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, RuntimeError, SystemError, MemoryError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError),
)
"""What numpy, zipfile and Pillow are seen to raise over a file that is not what its name says."""


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
        _check_names(self.name, self.labels)
        for x, y, what in ((self.x_train, self.y_train, "train"), (self.x_test, self.y_test, "test")):
            if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape:
                raise DataError(
                    f"{self.name}: {what} images are {x.dtype} {x.shape}, not uint8 (n, C, H, W) from 0 to 255"
                )
            if y.shape != (len(x),):
                raise DataError(f"{self.name}: {what} labels are {y.shape}, not one for each of {len(x)} images")
            if y.min() < 0 or y.max() >= len(self.labels):
                raise DataError(f"{self.name}: {what} labels are not one of 0..{len(self.labels) - 1} an image")
        counts = np.bincount(self.y_train, minlength=len(self.labels))
        if not counts.all():
            raise DataError(f"{self.name}: class {counts.argmin()} has no training sample; labels 0..K-1 have no gaps")
        if self.x_test.shape[1:] != self.shape:
            raise DataError(f"{self.name}: train images are {self.shape}, test images {self.x_test.shape[1:]}")

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

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, whose pixels count as 0..1.

        A channel that never varies has 0.001, for a network divides by it.
        """
        channels, height, width = self.shape
        histogram = np.zeros((channels, 256), np.int64)
        block = max(1, 2**20 // (height * width))  # images: bincount makes int64 of its input
        for start in range(0, len(self.x_train), block):
            for channel in range(channels):
                pixels = self.x_train[start : start + block, channel].ravel()
                histogram[channel] += np.bincount(pixels, minlength=256)
        values = np.arange(256) / 255
        shares = histogram / histogram.sum(1, keepdims=True)  # (C, 256)
        mean = shares @ values
        deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1)).clip(1e-3)
        return mean.round(4).tolist(), deviation.round(4).tolist()


def load(name: str) -> Dataset:
    """A data set by name; DataError says what to do when it is not to be had."""
    if name == "digits":
        return _digits()
    if name in ("cifar10", "fashion-mnist"):
        return _torchvision(name)
    kind, _, place = name.partition(":")
    if place and kind in ("npz", "folder"):
        path = Path(os.path.expanduser(place))  # noqa: PTH111  (Path.expanduser raises where there is no home)
        return _npz(path) if kind == "npz" else _folder(path)
    kind = "folder" if os.path.isdir(name) else "npz" if os.path.isfile(name) else ""
    hint = f"did you mean {kind}:{name}?" if kind else f"there are {', '.join(NAMES)}"
    raise DataError(f"no data set is called {name!r}; {hint}")


def _check_names(name: str, labels: tuple[str, ...]) -> None:
    """What a run writes down of a data set has to be printable, and tell classes apart."""
    if not name.isprintable():
        raise DataError(f"a data set is called {name!r}, which cannot be printed: rename it")
    if not 2 <= len(labels) <= MAX_CLASSES:
        raise DataError(f"{name}: the number of classes is {len(labels)}, not in 2..{MAX_CLASSES}")
    for number, label in enumerate(labels):
        if not label or not label.isprintable():
            raise DataError(f"{name}: class {number} is called {label!r}, which cannot be printed: rename it")
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise DataError(f"{name}: {times} classes are called {label!r}: rename all but one")


def _reason(error: BaseException) -> str:
    """Why, in one line: an OSError without its number and its path, which stand before it already."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


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
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False) if zipfile.is_zipfile(path) else None
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("no whole archive of arrays by name, such as numpy.savez writes")
            arrays = {key: np.asarray(archive[key]) for key in (*_ARRAYS, "classes") if key in archive.files}
        classes = arrays["classes"].tolist() if "classes" in arrays else None
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read as an .npz: {_reason(error)}") from error
    missing = [key for key in _ARRAYS if key not in arrays]
    if missing:
        raise DataError(f"{path}: holds no {missing[0]}; it needs {', '.join(_ARRAYS)}")
    for key in ("y_train", "y_test"):
        if arrays[key].dtype.kind not in "ui":
            raise DataError(f"{path}: labels are whole numbers, but {key} is {arrays[key].dtype}")
    highest = max(int(arrays[key].max(initial=0)) for key in ("y_train", "y_test"))
    if highest >= MAX_CLASSES:
        raise DataError(f"{path}: a label is {highest}; labels are 0..K-1 without gaps, and K is at most {MAX_CLASSES}")
    if classes is None:
        classes = range(highest + 1)
    elif arrays["classes"].ndim != 1 or arrays["classes"].dtype.kind not in "Uui":
        raise DataError(f"{path}: classes is {arrays['classes'].dtype} {arrays['classes'].shape}, not a list of names")
    if len(classes) <= highest:
        raise DataError(f"{path}: a label is {highest}, but classes has only {len(classes)} names, for 0 and up")
    x_train, x_test = (_channels_first(arrays[key]) for key in ("x_train", "x_test"))
    y_train, y_test = (arrays[key].astype(np.int64) for key in ("y_train", "y_test"))
    return Dataset(path.stem, x_train, y_train, x_test, y_test, tuple(map(str, classes)))


def _channels_first(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _folder(path: Path) -> Dataset:
    """train/CLASS/ and test/CLASS/ with images of one size; they have one channel when every one of them is grey."""
    if not {"train", "test"} & {entry.name for entry in _entries(path)}:
        raise DataError(f"{path}: holds neither train/ nor test/, and each needs a folder for every class: {_LAYOUT}")
    files = {part: {folder.name: _entries(folder) for folder in _entries(path / part)} for part in ("train", "test")}
    name, labels = Path(os.path.abspath(path)).name, tuple(files["train"])
    _check_names(name, labels)
    strange = files["test"].keys() - files["train"].keys()
    if strange:
        raise DataError(f"{path / 'test' / min(strange)}: train/ has no such class: {_LAYOUT}")
    x, y, size = {"train": [], "test": []}, {"train": [], "test": []}, None
    samples = [(part, label, file) for part in files for label in files[part] for file in files[part][label]]
    for part, label, file in samples:
        image = _pixels(file)
        _, height, width = image.shape
        size = size or (width, height)
        if (width, height) != size:
            raise DataError(f"{file}: is {width} × {height}, but {samples[0][-1]} {size[0]} × {size[1]}: scale to one")
        x[part].append(image)
        y[part].append(labels.index(label))
    channels = max(len(image) for images in x.values() for image in images)
    for part in x:  # a grey image among others fills their channels
        x[part] = np.stack([np.broadcast_to(image, (channels, height, width)) for image in x[part]])
    return Dataset(name, x["train"], np.array(y["train"]), x["test"], np.array(y["test"]), labels)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, sorted."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no folder that can be read ({_reason(error)}): {_LAYOUT}") from error
    if not entries:
        raise DataError(f"{folder}: is empty, so fill it or remove it: {_LAYOUT}")
    return entries


def _pixels(file: Path) -> NDArray[np.uint8]:
    """(1, H, W) of a grey image, (3, H, W) of any other, turned as its EXIF orientation says; alpha is dropped."""
    from PIL import Image, ImageOps

    if file.suffix.lower() not in _FORMATS or not os.path.isfile(file):
        raise DataError(f"{file}: no file that ends in {', '.join(_FORMATS)}: move it elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is odd about an image and yet harmless
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=tuple(_FORMATS.values())) as opened:
                image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                return (np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)[None]
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
        except (*_DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{file}: cannot be read as an image: {_reason(error)}") from error
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def _torchvision(name: str) -> Dataset:
    from nmoe_train.data.vision import fetched

    try:
        train, test = fetched(name, ROOT)
    except (OSError, RuntimeError, HTTPException) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{name} is not in {ROOT}/ and cannot be fetched ({why}); bring it, or use npz:FILE") from error
    parts = [(_channels_first(np.asarray(p.data)), np.asarray(p.targets, np.int64)) for p in (train, test)]
    return Dataset(name, *parts[0], *parts[1], tuple(train.classes))
