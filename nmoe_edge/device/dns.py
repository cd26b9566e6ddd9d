"""Resolves the host names in a fleet's addresses, in threads of their own.

libzmq would resolve them in the one thread that moves all messages, where a name that cannot be resolved delays every
other peer.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from nmoe_edge.bundle.fleet import Device

_NUMERIC = re.compile(r"tcp://(\[.*\]|[0-9.]+):\d+")


def is_numeric(address: str) -> bool:
    """Whether the address contains an IP address, not a host name."""
    return _NUMERIC.fullmatch(address) is not None


class Resolver:
    """Resolves addresses, one thread per look-up: some names take half a minute."""

    def __init__(self, resolved: Callable[[Device, str], None]) -> None:
        """resolved: called with the device, as it was given, and its numeric address; in any thread."""
        self._resolved = resolved
        self._under_way: set[str] = set()

    def look_up(self, device: Device) -> None:
        """Start to resolve a device's address, unless that is under way already."""
        if device.name not in self._under_way:
            self._under_way.add(device.name)
            threading.Thread(target=self._look_up, args=(device,), name="resolver", daemon=True).start()

    def _look_up(self, device: Device) -> None:
        host, _, port = device.address.removeprefix("tcp://").rpartition(":")
        try:
            with suppress(OSError, UnicodeError):  # it cannot be resolved now; Peers asks again later
                first, *_ = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
                ip = first[4][0]
                self._resolved(device, f"tcp://{ip}:{port}")
        finally:
            self._under_way.discard(device.name)
