"""Loads data sets as uint8 arrays in memory, checks them, and says what to do if one cannot be used.

partition.py and clients.py distribute a data set among clients; vision.py downloads what torchvision offers.
"""

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
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_train.errors import DataError

TORCHVISION = (
    *("mnist", "fashion-mnist", "kmnist", "emnist", "qmnist", "usps"),
    *("svhn", "cifar10", "cifar100", "stl10"),
)
"""Data sets that vision.py loads and downloads"""
NAMES = ("digits", *TORCHVISION, "npz:FILE", "folder:DIR")
ROOT = Path("data")
"""Folder of torchvision's data sets, relative to the current folder; downloads go there too"""
MAX_CLASSES = 4096
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_MEDMNIST = {
    "x_train": ("train_images", "val_images"),
    "y_train": ("train_labels", "val_labels"),
    "x_test": ("test_images",),
    "y_test": ("test_labels",),
}
"""Names of the same arrays in a file of MedMNIST; its validation samples join the training samples"""
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
_LAYOUT = "a data set is DIR/train/CLASS/*.png and DIR/test/CLASS/*.png"
"""Ends every error message about a folder of images"""
_DAMAGED = (
    *(OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, RuntimeError, SystemError, MemoryError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError),
)
"""Every error type that numpy, zipfile and Pillow have raised for damaged files"""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images and their classes, already split into training and test samples. DataError if they do not fit together."""

    name: str
    x_train: NDArray[np.uint8]
    """(n, C, H, W)"""
    y_train: NDArray[np.int64]
    """(n,), each 0..K-1"""
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    labels: tuple[str, ...]
    """Names of the K classes"""

    def __post_init__(self) -> None:
        _check_names(self.name, self.labels)
        self._check_part("train", self.x_train, self.y_train)
        self._check_part("test", self.x_test, self.y_test)
        counts = np.bincount(self.y_train, minlength=len(self.labels))
        if not counts.all():
            raise DataError(
                f"{self.name}: class {counts.argmin()} has no training sample; add one, or number the classes 0..K-1"
                " without gaps"
            )
        test_shape = self.x_test.shape[1:]
        if test_shape != self.shape:
            raise DataError(
                f"{self.name}: train images are {self.shape} (C, H, W), but test images are {test_shape}; "
                "scale all images to one size"
            )

    def _check_part(self, part: str, x: NDArray[np.uint8], y: NDArray[np.int64]) -> None:
        if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape:
            raise DataError(
                f"{self.name}: {part} images are {x.dtype} {x.shape}; they must be uint8 (n, C, H, W), 0 to 255"
            )
        if y.shape != (len(x),):
            raise DataError(
                f"{self.name}: {part} labels have shape {y.shape}; expected ({len(x)},), one label per image"
            )
        if y.min() < 0 or y.max() >= len(self.labels):
            raise DataError(f"{self.name}: {part} labels must lie in 0..{len(self.labels) - 1}, the class numbers")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.x_train.shape[1:]

    def fingerprint(self) -> str:
        """SHA-256 of all images and labels."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, with pixels scaled to 0..1.

        The standard deviation is at least 0.001, because networks divide by it.
        """
        channels, height, width = self.shape
        histogram = np.zeros((channels, 256), np.int64)
        block = max(1, 2**20 // (height * width))  # images at a time: bincount copies its input to int64
        for start in range(0, len(self.x_train), block):
            for channel in range(channels):
                pixels = self.x_train[start : start + block, channel].ravel()
                histogram[channel] += np.bincount(pixels, minlength=256)
        values = np.arange(256) / 255
        shares = histogram / histogram.sum(1, keepdims=True)  # (C, 256)
        mean = shares @ values
        deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
        if (deviation < 1e-9).all():
            raise DataError(
                f"{self.name}: all training images are the same single colour, so there is nothing to learn from;"
                " check how the images were made"
            )
        deviation = deviation.clip(1e-3)
        return mean.round(4).tolist(), deviation.round(4).tolist()


def load(name: str) -> Dataset:
    """Load a data set by name: one of NAMES. DataError if it is unknown, missing or damaged."""
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(name)
    kind, _, location = name.partition(":")
    if location and kind in ("npz", "folder"):
        path = Path(os.path.expanduser(location))  # noqa: PTH111  (Path.expanduser raises if HOME is not set)
        return _npz(path) if kind == "npz" else _folder(path)
    raise DataError(f"unknown data set {name!r}; {_hint(name)}")


def _hint(name: str) -> str:
    if os.path.isdir(name):
        return f"did you mean folder:{name}?"
    if os.path.isfile(name):
        return f"did you mean npz:{name}?"
    return f"expected one of {', '.join(NAMES)}"


def _check_names(name: str, labels: tuple[str, ...]) -> None:
    """A run records these names, so they must be printable, and class names must differ."""
    if not name.isprintable():
        raise DataError(f"the name of the data set, {name!r}, cannot be printed; rename it")
    if not 2 <= len(labels) <= MAX_CLASSES:
        raise DataError(f"{name}: the number of classes is {len(labels)}; it must be in 2..{MAX_CLASSES}")
    for number, label in enumerate(labels):
        if not label:
            raise DataError(f"{name}: the name of class {number} is empty; give it one")
        if not label.isprintable():
            raise DataError(f"{name}: the name of class {number}, {label!r}, cannot be printed; rename it")
    label, times = Counter(labels).most_common(1)[0]
    if times > 1:
        raise DataError(f"{name}: {times} classes have the name {label!r}; rename all but one")


def _reason(error: BaseException) -> str:
    """An error's text in one line. For an OSError without errno and path, which the message gives already."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _digits() -> Dataset:
    """scikit-learn's 1797 digits of 8 × 8 pixels. Every class has 120 training samples, 12 for each of ten clients."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images * 15).astype(np.uint8)[:, None]  # 0..16 -> 0..240
    y = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(y))
    rank = np.zeros(len(y), np.int64)  # position of each sample within its class, in random order
    for label in range(10):
        members = order[y[order] == label]
        rank[members] = np.arange(len(members))
    train, test = order[rank[order] < 120], order[rank[order] >= 120]
    return Dataset("digits", x[train], y[train], x[test], y[test], tuple(map(str, range(10))))


def _npz(path: Path) -> Dataset:
    """A file with x_train, y_train, x_test, y_test and optionally classes, the names of the classes.

    Images are (n, H, W), (n, H, W, C) or (n, C, H, W). Or a file of MedMNIST, as it is.
    """
    arrays = _npz_arrays(path)
    if "train_images" in arrays and "x_train" not in arrays:
        arrays = _from_medmnist(path, arrays)
    for key in _ARRAYS:
        if key not in arrays:
            raise DataError(f"{path}: {key} is missing; the file needs {', '.join(_ARRAYS)}")
    for key in ("y_train", "y_test"):
        if arrays[key].dtype.kind not in "ui":
            raise DataError(f"{path}: labels must be integers, but {key} is {arrays[key].dtype}")
    max_label = max(int(arrays[key].max(initial=0)) for key in ("y_train", "y_test"))
    if max_label >= MAX_CLASSES:
        raise DataError(
            f"{path}: a label is {max_label}; labels are 0..K-1 without gaps, and K is at most {MAX_CLASSES}"
        )
    names = _class_names(path, arrays.get("classes"), max_label)
    return Dataset(
        path.stem,
        _channels_first(arrays["x_train"]),
        arrays["y_train"].astype(np.int64),
        _channels_first(arrays["x_test"]),
        arrays["y_test"].astype(np.int64),
        names,
    )


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the file that a data set can use, by name."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False) if zipfile.is_zipfile(path) else None
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("not a complete archive of named arrays; write it with numpy.savez")
            known = {*_ARRAYS, "classes", *chain(*_MEDMNIST.values())} & set(archive.files)
            arrays = {key: np.asarray(archive[key]) for key in known}
        if "classes" in arrays:
            arrays["classes"].tolist()  # fails here, not later, if an element is damaged
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read as an .npz: {_reason(error)}") from error
    return arrays


def _from_medmnist(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """MedMNIST's arrays under our names. Its validation samples join the training samples, because every client holds
    out samples of its own.
    """
    missing = [name for names in _MEDMNIST.values() for name in names if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: {missing[0]} is missing; a file of MedMNIST has train, val and test images and labels"
        )
    try:
        ours = {name: np.concatenate([arrays[part] for part in parts]) for name, parts in _MEDMNIST.items()}
    except ValueError as error:
        raise DataError(f"{path}: its arrays do not fit together: {error}") from error
    for key in ("y_train", "y_test"):
        y = ours[key]
        if y.ndim == 2 and y.shape[1] > 1:
            raise DataError(
                f"{path}: every image has {y.shape[1]} labels; only data with one label per image is supported"
            )
        ours[key] = y[:, 0] if y.ndim == 2 else y
    return ours


def _class_names(path: Path, classes: NDArray[Any] | None, max_label: int) -> tuple[str, ...]:
    """The names of the classes; their numbers if the file has no names."""
    if classes is None:
        return tuple(map(str, range(max_label + 1)))
    if classes.ndim != 1 or classes.dtype.kind not in "Uui":
        raise DataError(f"{path}: classes is {classes.dtype} {classes.shape}; it must be a list of names")
    if len(classes) <= max_label:
        raise DataError(f"{path}: a label is {max_label}, but classes has only {len(classes)} names; name every class")
    return tuple(map(str, classes.tolist()))


def _channels_first(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, H, W) or (n, H, W, C) -> (n, C, H, W); any other shape stays for Dataset to check."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _folder(path: Path) -> Dataset:
    """Images of one size in train/CLASS/ and test/CLASS/. They get one channel if all are grey, else three."""
    if not {"train", "test"} & {entry.name for entry in _entries(path)}:
        raise DataError(f"{path}: contains neither train/ nor test/; each needs one folder per class: {_LAYOUT}")
    files = {part: {folder.name: _entries(folder) for folder in _entries(path / part)} for part in ("train", "test")}
    name = Path(os.path.abspath(path)).name
    labels = tuple(files["train"])
    _check_names(name, labels)
    unknown = files["test"].keys() - files["train"].keys()
    if unknown:
        raise DataError(f"{path / 'test' / min(unknown)}: train/ has no folder for this class: {_LAYOUT}")
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    y: dict[str, list[int]] = {"train": [], "test": []}
    first_file, _ = _labelled_files(files["train"], labels)[0]
    first_image = _pixels(first_file)
    for part, folders in files.items():
        for file, label in _labelled_files(folders, labels):
            image = _pixels(file)
            if image.shape[1:] != first_image.shape[1:]:
                raise DataError(
                    f"{file}: is {_size(image)}, but {first_file} is {_size(first_image)}; scale all images to one size"
                )
            images[part].append(image)
            y[part].append(label)
    channels = max(len(image) for image in (*images["train"], *images["test"]))
    x = {part: np.stack([_with_channels(image, channels) for image in images[part]]) for part in images}
    return Dataset(name, x["train"], np.array(y["train"]), x["test"], np.array(y["test"]), labels)


def _labelled_files(folders: Mapping[str, list[Path]], labels: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Every image file with the number of its class, in alphabetical order."""
    return [(file, labels.index(label)) for label, files in folders.items() for file in files]


def _size(image: NDArray[np.uint8]) -> str:
    _, height, width = image.shape
    return f"{width} × {height}"


def _with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """A grey image repeated over all channels; a colour image as it is. (1 or C, H, W) -> (C, H, W)"""
    return np.broadcast_to(image, (channels, *image.shape[1:]))


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted. DataError if there are none."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a folder ({_reason(error)}): {_LAYOUT}") from error
    if not entries:
        raise DataError(f"{folder}: is empty; fill it or remove it: {_LAYOUT}")
    return entries


def _pixels(file: Path) -> NDArray[np.uint8]:
    """An image as (1, H, W) if it is grey, else (3, H, W). Applies its EXIF orientation and drops transparency."""
    from PIL import Image, ImageOps

    if file.suffix.lower() not in _FORMATS or not os.path.isfile(file):
        raise DataError(f"{file}: not an image file ({', '.join(_FORMATS)}); move it out of the data set")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about harmless oddities of an image
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=tuple(_FORMATS.values())) as opened:
                image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
                return (np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)[None]
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
        except (*_DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{file}: cannot be read as an image: {_reason(error)}") from error
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def _torchvision(name: str) -> Dataset:
    from nmoe_train.vision import load_or_download

    try:
        train, test = load_or_download(name, ROOT)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is not in {ROOT}/ and cannot be downloaded ({reason}); copy it there, or use npz:FILE"
        ) from error
    x_train, y_train = _arrays(train)
    x_test, y_test = _arrays(test)
    names = getattr(train, "classes", None) or range(int(y_train.max()) + 1)
    return Dataset(name, x_train, y_train, x_test, y_test, tuple(map(str, names)))


def _arrays(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, C, H, W) and labels (n,) of a torchvision data set."""
    y = np.asarray(part.targets if hasattr(part, "targets") else part.labels, np.int64)
    if y.ndim == 2:  # QMNIST describes a sample in eight numbers; the first is its class
        y = y[:, 0]
    return np.ascontiguousarray(_channels_first(np.asarray(part.data))), y
