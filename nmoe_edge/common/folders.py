"""Replaces a folder in one step: a reader sees the whole old folder or the whole new one.

This module does not interpret the files. It raises OSError, or ValueError for a destination that must not be replaced.
The caller translates both, because it knows what the folder is for.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nmoe_edge.common.files import remove_orphans

# From Linux's fcntl.h and fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

_STAGED = ".staged"
"""Suffix of a temporary folder until it is renamed; unusual enough not to match a user's own folder."""


def file_stamps(folder: Path, extra: Path | None = None) -> list[tuple[int, int, int]]:
    """A value that changes when a file of the folder changes, or the file `extra`.

    One (inode, mtime in ns, size) per file. The list can be incomplete while the folder is being replaced.
    """
    found = []
    with suppress(OSError):
        paths = sorted(folder.iterdir())
        if extra is not None:
            paths.append(extra)
        for path in paths:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


@contextmanager
def staged_folder(destination: Path, marker: str, allowed: str) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block succeeds, it replaces `destination`, else it is removed.

    An existing `destination` is replaced only if `check_replaceable` accepts it.
    """
    check_replaceable(destination, marker, allowed)
    destination.parent.mkdir(parents=True, exist_ok=True)
    orphan = re.compile(rf"\.{re.escape(destination.name)}\.[a-z0-9_]{{8}}{re.escape(_STAGED)}")  # as mkdtemp names it
    remove_orphans(destination.parent, orphan)
    staging, lock = _locked_folder(destination)
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp creates it for its owner alone
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        _swap(staging, destination)
        _flush(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def check_replaceable(folder: Path, marker: str, allowed: str) -> None:
    """Raise ValueError if `staged_folder` would not replace `folder`; call it before long work.

    An existing folder is replaceable when it is empty, or when it contains the file `marker` and the relative path of
    every file in it matches the regular expression `allowed`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError("not a folder; choose another place")
    existing_parents = (path for path in folder.absolute().parents if path.exists())
    parent = next(existing_parents, Path("/"))
    if not parent.is_dir():
        raise ValueError(f"{parent} is not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} cannot be written to; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    foreign = [name for name in sorted(files) if not re.fullmatch(allowed, name)]
    if foreign:
        raise ValueError(f"holds {foreign[0]!r}, which would be lost; choose another place")
    if marker not in files:
        raise ValueError(f"holds something without a {marker}, which would be lost; choose another place")


def _locked_folder(destination: Path) -> tuple[Path, int]:
    """Create a temporary folder next to `destination`; it stays locked until the returned file descriptor is closed."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=_STAGED, dir=destination.parent))
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as an orphan before we locked it: try again
            continue
        with suppress(OSError):  # a file system without locks; remove_orphans removes nothing there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if staging.exists():
            return staging, lock
        os.close(lock)


def _flush(path: Path) -> None:
    """Flush to the disk, so that after a power cut the new name points to complete files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(staging: Path, destination: Path) -> None:
    """Rename `staging` to `destination`; an existing destination gets the name `staging`."""
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        # Without an atomic exchange `destination` is missing for a moment.
        retired = staging.with_name(staging.name + ".old")
        destination.rename(retired)
        try:
            staging.rename(destination)
        except OSError:
            retired.rename(destination)
            raise
        retired.rename(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically; False where the system or the file system does not support it."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)
