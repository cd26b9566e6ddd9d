"""What the host names of a fleet stand for: libzmq would look them up in the one thread that moves all messages, and a
name that nobody knows at present would hold up everybody.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from nmoe_edge.bundle.fleet import Device

_NUMBERS = re.compile(r"tcp://(\[.*\]|[0-9.]+):\d+")


def is_numbers(address: str) -> bool:
    """Whether there is nothing to look up in it."""
    return _NUMBERS.fullmatch(address) is not None


class Resolver:
    """Looks up where devices are, each in a thread of its own: some names take half a minute."""

    def __init__(self, found: Callable[[Device, str], None]) -> None:
        """found: told a device, as it was asked for, and its address in numbers; in any thread."""
        self._found = found
        self._under_way: set[str] = set()

    def look_up(self, device: Device) -> None:
        """Have it looked up, unless it is being."""
        if device.name not in self._under_way:
            self._under_way.add(device.name)
            threading.Thread(target=self._look_up, args=(device,), name="names", daemon=True).start()

    def _look_up(self, device: Device) -> None:
        host, _, port = device.address.removeprefix("tcp://").rpartition(":")
        try:
            with suppress(OSError, UnicodeError):  # nobody knows it at present: it is asked for again
                (*_, place), *_ = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
                self._found(device, f"tcp://{place[0]}:{port}")
        finally:
            self._under_way.discard(device.name)
