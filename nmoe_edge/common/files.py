"""Replace a file in one step: a reader sees the old bytes or the new ones, never half of them.

Errors are OSError; the caller knows what the file was for and translates them.
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


def replace_file(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) beside `path`, flush it to the disk and rename it to `path`.

    When that fails, `path` is as it was and nothing is left beside it. A symbolic link stays: its target is replaced.
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
    """A new file beside `path`, locked while it is open, so that no other process takes it for an orphan."""
    while True:
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_STAGED}")
        file = staged.open("xb")
        with suppress(OSError):  # a file system without locks; there nothing is taken for an orphan either
            fcntl.flock(file, fcntl.LOCK_EX)
        if staged.exists():
            return staged, file
        file.close()  # taken for an orphan before it was locked


def remove_orphans(path: Path, suffix: str) -> None:
    """Remove what killed processes left beside `path`: staged files and folders that no process has locked."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    with suppress(OSError):
        for orphan in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
            _remove_unlocked(orphan)


def _remove_unlocked(orphan: Path) -> None:
    if orphan.is_symlink():
        return
    with suppress(OSError):  # locked by its writer, or removed meanwhile
        handle = os.open(orphan, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if orphan.is_dir():
                shutil.rmtree(orphan, ignore_errors=True)
            else:
                orphan.unlink()
        finally:
            os.close(handle)
