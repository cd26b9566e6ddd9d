"""The only import of torchvision; works even if torchvision's compiled operators do not fit the installed torch.

A torchvision built for CUDA next to a torch built for the CPU fails at import, because two of its operators are
unknown. We use its networks and data sets, which need neither operator, so declaring the two is enough.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    import torchvision
except RuntimeError as error:
    if "does not exist" not in str(error):
        raise
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

from torchvision import datasets, models

__all__ = ["SETS", "datasets", "load_or_download", "models"]

Load = Callable[..., Any]
"""(folder, train: bool, download: bool = False) -> torchvision's data set"""


def _by_split(kind: Callable[..., Any]) -> Load:
    """A class that takes split="train" or "test" in place of train=True or False."""
    return lambda root, train, download=False: kind(root, split="train" if train else "test", download=download)


SETS: dict[str, tuple[Load, str]] = {
    "mnist": (datasets.MNIST, "MNIST/raw/*.gz"),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*.gz"),
    "kmnist": (datasets.KMNIST, "KMNIST/raw/*.gz"),
    "emnist": (partial(datasets.EMNIST, split="balanced"), "EMNIST/raw/gzip.zip"),
    "qmnist": (datasets.QMNIST, "QMNIST/raw/*.gz"),
    "usps": (datasets.USPS, "usps*.bz2"),
    "svhn": (_by_split(datasets.SVHN), "*_32x32.mat"),
    "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python.tar.gz"),
    "stl10": (_by_split(datasets.STL10), "stl10_binary.tar.gz"),
}
"""How each data set is loaded, and the pattern of its downloaded archives inside the data folder.

These are torchvision's sets with a training and a test part and images of one size. Of EMNIST it is "balanced": 47
classes, where similar capitals and small letters count as one.
"""


def load_or_download(name: str, root: Path) -> tuple[Any, Any]:
    """torchvision's train and test sets from the folder `root`; downloads them if they are missing or damaged.

    Raises torchvision's own errors: OSError, RuntimeError or HTTPException.
    """
    load, archives = SETS[name]
    try:
        return load(root, train=True), load(root, train=False)
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, FileNotFoundError, EOFError):
        _fetch(load, archives, root)  # missing, or unpacked only in part
    return load(root, train=True), load(root, train=False)


def _fetch(load: Load, archives: str, root: Path) -> None:
    """Download and unpack in a temporary folder, then move complete files to `root`. A failure leaves nothing."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder, redirect_stdout(sys.stderr):
        for archive in root.glob(archives):  # without a network, users copy the archives here themselves
            copy = Path(folder) / archive.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive, copy)
        for train in (True, False):  # some sets have a file for each
            load(folder, train=train, download=True)
        for file in [path for path in Path(folder).rglob("*") if path.is_file()]:
            target = root / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
