"""The one door to torchvision, which opens also where its compiled operators do not fit the installed torch.

A torchvision built for CUDA next to a torch built for CPU fails at import because two of its operators are unknown. We
use its networks, data sets and transforms, none of which needs them; declaring the two is enough.
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

__all__ = ["datasets", "fetched", "models"]

_SETS = {
    "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*.gz"),
}
"""A data set's class, and where in its folder the archives lie that it is unpacked from."""


def fetched(name: str, root: Path) -> tuple[Any, Any]:
    """torchvision's train and test set out of `root`, where they are put when they are not there or damaged.

    Raises what torchvision does: OSError, RuntimeError or HTTPException.
    """
    kind, archives = _SETS[name]
    try:
        return kind(root, train=True), kind(root, train=False)
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError):  # absent, or cut off while unpacked
        _fetch(kind, archives, root)
    return kind(root, train=True), kind(root, train=False)


def _fetch(kind: Any, archives: str, root: Path) -> None:
    """Fetch and unpack in a folder beside, so that what is cut off leaves nothing; whole files move to their place."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder, redirect_stdout(sys.stderr):
        for archive in root.glob(archives):  # somebody without a network may have brought them
            copy = Path(folder) / archive.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive, copy)
        kind(folder, download=True)
        for file in [path for path in Path(folder).rglob("*") if path.is_file()]:
            place = root / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
