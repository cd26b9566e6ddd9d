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

_STAGED = re.compile(r"\.[0-9a-f]{8}\.nmoe-new")
"""Name of a temporary file. It does not contain the final name, which may be as long as the file system allows."""


def replace_file(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write `data` (text as UTF-8) to a temporary file in the same folder and rename it to `path`.

    If that fails, `path` is unchanged and the temporary file is removed. If `path` is a symbolic link, its target is
    replaced and the link stays. durable: flush to the disk first, which may take seconds on an SD card; without it, a
    power cut may leave an empty file.
    """
    path = Path(os.path.realpath(path))  # where Path.resolve raises RuntimeError, say for a loop of links
    remove_orphans(path.parent, _STAGED)
    staged, file = _locked_file(path)
    try:
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _locked_file(path: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file for `path`. It is locked while open, so that no other process removes it as an orphan."""
    while True:
        staged = path.with_name(f".{secrets.token_hex(4)}.nmoe-new")
        file = staged.open("xb")
        with suppress(OSError):  # a file system without locks; remove_orphans removes nothing there
            fcntl.flock(file, fcntl.LOCK_EX)
        if staged.exists():
            return staged, file
        file.close()  # another process removed it as an orphan before we locked it: try again


def remove_orphans(folder: Path, name: re.Pattern[str]) -> None:
    """Remove temporary files and folders of this name that killed processes left, that is, those without a lock."""
    with suppress(OSError):
        for orphan in [entry for entry in folder.iterdir() if name.fullmatch(entry.name)]:
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
