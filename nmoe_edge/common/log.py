"""What a device says while it serves: a line an event on stderr, for people or as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

from nmoe_edge.common.text import printable

_EVERY_S = 60.0


class Log:
    """Lines of events; those that a stranger can cause come once a minute at most, with how often they came."""

    def __init__(self, device: str, as_json: bool = False) -> None:
        """device: whose lines these are."""
        self._device, self._as_json = device, as_json
        self._said_at: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, event: str, text: str = "", **facts: object) -> None:
        """Say it now."""
        with self._lock:
            if self._as_json:
                said = {"event": event, **({"text": text} if text else {}), **facts}
                line = json.dumps({"time": round(time.time(), 3), "device": self._device, **said})
            else:
                stamp = time.strftime("%H:%M:%S")
                line = printable(f"{stamp} {self._device} {event}{': ' if text else ''}{text}")
            with suppress(OSError, ValueError, AttributeError):  # full, closed or none: a device serves without it
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    def rarely(self, event: str, text: str = "", **facts: object) -> None:
        """Say it, unless the same was said within a minute: then count it."""
        now = time.monotonic()
        if now - self._said_at.get(event, -_EVERY_S) < _EVERY_S:
            self._held[event] += 1
            return
        self._said_at[event] = now
        held = self._held.pop(event, 0)
        self(event, text + (f" ({held} more in the last minute)" if held else ""), held=held, **facts)
