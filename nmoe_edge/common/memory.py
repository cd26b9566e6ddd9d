"""What the allocator keeps and nobody uses, given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Give it back."""
    with suppress(OSError, AttributeError):  # not glibc: nothing to be done
        ctypes.CDLL(None).malloc_trim(0)
