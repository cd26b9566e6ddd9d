"""A folder that is written as a whole: a reader sees the new one or the old one, never half of one.

Knows nothing of what is in it. What goes wrong is an OSError, or a ValueError for a place that is not ours to write
over; whoever knows what the folder was for translates it.
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

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""From Linux's fcntl.h and fs.h."""
_STAGED = ".staged"
"""How the names of unfinished folders end, so that nobody else's is taken for one."""


def stamps(folder: Path, beside: Path | None = None) -> list[tuple[int, int, int]]:
    """What changes when a file of the folder does, or the one beside it; less than all while it is being replaced."""
    found = []
    with suppress(OSError):
        for path in (*sorted(folder.iterdir()), *([] if beside is None else [beside])):
            it = path.stat()
            found.append((it.st_ino, it.st_mtime_ns, it.st_size))
    return found


@contextmanager
def staged_folder(destination: Path, marker: str, ours: str) -> Iterator[Path]:
    """An empty folder that takes the place of `destination` when the block ends well, and is gone when it does not.

    What is there already is replaced only when it is empty, or holds the file `marker` and no file whose path is not
    matched by the regular expression `ours`.
    """
    check_replaceable(destination, marker, ours)
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(destination, _STAGED)
    staging, held = _held_folder(destination)
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp keeps everybody else out
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        _swap(staging, destination)
        _flush(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


def check_replaceable(folder: Path, marker: str, ours: str) -> None:
    """Refuse, as a ValueError, a place that `staged_folder` would not replace: worth asking before long work."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError("not a folder; choose another place")
    above = next((path for path in folder.absolute().parents if path.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is no folder"
        raise ValueError(f"{above} {why}; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    inside = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    foreign = [name for name in sorted(inside) if not re.fullmatch(ours, name)]
    if foreign or marker not in inside:
        what = f"{foreign[0]!r}" if foreign else f"something without a {marker}"
        raise ValueError(f"holds {what}, which would be lost; choose another place")


def _held_folder(destination: Path) -> tuple[Path, int]:
    """A new folder beside `destination`, locked for as long as the handle is open: somebody is at work in it."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=_STAGED, dir=destination.parent))
        try:
            held = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # taken for an orphan before it was locked
            continue
        with suppress(OSError):  # a file system without locks; there nothing is taken for an orphan either
            fcntl.flock(held, fcntl.LOCK_EX)
        if staging.exists():
            return staging, held
        os.close(held)


def _flush(path: Path) -> None:
    """To the disk with it: a board that loses its power finds whole files behind the new name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(staging: Path, destination: Path) -> None:
    """Put `staging` where `destination` is, and what was there, if anything, where `staging` was."""
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        # No such call here: for a moment there is none of the two.
        retired = staging.with_name(staging.name + ".old")
        destination.rename(retired)
        try:
            staging.rename(destination)
        except OSError:
            retired.rename(destination)
            raise
        retired.rename(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)
