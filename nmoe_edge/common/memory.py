"""Returns unused memory to the operating system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Make glibc release the free memory that its allocator keeps; other C libraries are left alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
