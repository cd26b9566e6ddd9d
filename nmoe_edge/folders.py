"""A folder that is written as a whole: a reader sees the new one, the old one, or none, never half of one.

Knows nothing of what is in it. What goes wrong is an OSError, or a ValueError for a place that is not ours to write
over; whoever knows what the folder was for translates it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(destination: Path, marker: str) -> Iterator[Path]:
    """An empty folder that takes the place of `destination` when the block ends well, and is gone when it does not.

    A folder that is there already is replaced only when it is empty or holds a `marker`, the file that makes it ours.
    """
    _check_replaceable(destination, marker)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp keeps everybody else out
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        _swap(staging, destination)
        _flush(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(folder: Path, marker: str) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError("not a folder; choose another place")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(f"holds something else than a {marker} and what belongs to it; choose another place")


def _flush(path: Path) -> None:
    """To the disk with it: a board that loses its power finds whole files behind the new name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(staging: Path, destination: Path) -> None:
    """Put `staging` where `destination` is; what was there goes only when that has succeeded."""
    if not destination.exists():
        staging.rename(destination)
        return
    retired = staging.with_name(staging.name + ".old")
    destination.rename(retired)
    try:
        staging.rename(destination)
    except OSError:
        retired.rename(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)
