"""Limits and names shared by the wire, the bundle, the fleet file and the run."""

from __future__ import annotations

import re

MAX_EXPERTS = 1024
"""Experts in one fleet. The wire's header allows 65,535, but a gate with that many outputs is not practical."""
MAX_ANSWERED = 64
"""Experts that one row may list as answering or as missing; far more than any top-k."""

_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_device_name(name: object) -> None:
    """Raise ValueError unless `name` is a valid device name, which is also safe as a folder name and in a log line."""
    if not isinstance(name, str) or not _DEVICE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a device name: use letters, digits, '_', '.' and '-', at most 63")
