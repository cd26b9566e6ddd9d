"""The only import of torchvision; works even if torchvision's compiled operators do not fit the installed torch.

A torchvision built for CUDA next to a torch built for the CPU fails at import, because two of its operators are
unknown. We use its networks and data sets, which need neither operator, so declaring the two is enough.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import redirect_stdout
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

__all__ = ["datasets", "load_or_download", "models"]

_SETS = {
    "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*.gz"),
}
"""Each data set's class, and the pattern of its downloaded archives inside the data folder."""


def load_or_download(name: str, root: Path) -> tuple[Any, Any]:
    """torchvision's train and test sets from the folder `root`; downloads them if they are missing or damaged.

    Raises torchvision's own errors: OSError, RuntimeError or HTTPException.
    """
    kind, archives = _SETS[name]
    try:
        return kind(root, train=True), kind(root, train=False)
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError):  # missing, or unpacked only in part
        _fetch(kind, archives, root)
    return kind(root, train=True), kind(root, train=False)


def _fetch(kind: Any, archives: str, root: Path) -> None:
    """Download and unpack in a temporary folder, then move complete files to `root`. A failure leaves nothing."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder, redirect_stdout(sys.stderr):
        for archive in root.glob(archives):  # without a network, users copy the archives here themselves
            copy = Path(folder) / archive.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive, copy)
        kind(folder, download=True)
        for file in [path for path in Path(folder).rglob("*") if path.is_file()]:
            target = root / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
