"""Replaces a file in one step: a reader sees the old bytes or the new ones, never a mixture.

Errors are OSError. The caller translates them, because it knows what the file is for.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_STAGED = ".new"
"""Suffix of a temporary file until it is renamed to its final name."""


def replace_file(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to a temporary file in the same folder, flush it to the disk, rename it to `path`.

    If that fails, `path` is unchanged and the temporary file is removed. If `path` is a symbolic link, its target is
    replaced and the link stays.
    """
    path = path.resolve()
    remove_orphans(path, _STAGED)
    staged, file = _locked_file(path)
    try:
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _locked_file(path: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file for `path`. It is locked while open, so that no other process removes it as an orphan."""
    while True:
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_STAGED}")
        file = staged.open("xb")
        with suppress(OSError):  # a file system without locks; remove_orphans removes nothing there
            fcntl.flock(file, fcntl.LOCK_EX)
        if staged.exists():
            return staged, file
        file.close()  # another process removed it as an orphan before we locked it: try again


def remove_orphans(path: Path, suffix: str) -> None:
    """Remove temporary files and folders for `path` that killed processes left, that is, those without a lock."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    with suppress(OSError):
        for orphan in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
            _remove_unlocked(orphan)


def _remove_unlocked(orphan: Path) -> None:
    if orphan.is_symlink():
        return
    with suppress(OSError):  # its writer holds the lock, or another process has just removed it
        handle = os.open(orphan, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if orphan.is_dir():
                shutil.rmtree(orphan, ignore_errors=True)
            else:
                orphan.unlink()
        finally:
            os.close(handle)
