"""The events that a device logs, and the two places where they can go: stderr or Python's logging.

`nmoe-edge serve` writes lines to stderr, for people or as JSON. An application that embeds a Node gets records of the
logger "nmoe"; nothing appears unless it configures logging.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from nmoe_edge.common.text import printable

LOGGER = "nmoe"
"""The name of our logger in Python's logging."""
_REPEAT_S = 60.0
"""`rarely` logs an event of a peer at most once in this many seconds."""


class Event(NamedTuple):
    """What one event of the log means, and its level in Python's logging."""

    level: int
    meaning: str


EVENTS = {
    "peer_alive": Event(logging.INFO, "the peer was greeted and is asked from now on"),
    "peer_silent": Event(logging.WARNING, "the peer owes an answer for too long; it is asked again after a probe"),
    "peer_lost": Event(logging.WARNING, "the connection to the peer is gone; it is asked again after a probe"),
    "peer_wrong": Event(logging.WARNING, "the peer sent an unusable answer; it is asked again after a probe"),
    "peer_foreign": Event(logging.WARNING, "the peer is another device, has another trunk, or does not know this one"),
    "peer_left": Event(logging.INFO, "the peer is shutting down"),
    "peer_refuses": Event(logging.WARNING, "the peer refuses this device's greeting; the text is its reason"),
    "peer_mismatch": Event(logging.WARNING, "the device at the peer's address has another name, expert or trunk"),
    "peer_found": Event(logging.INFO, "mDNS names another address for the peer"),
    "peer_unreachable": Event(logging.WARNING, "no socket could be opened for the peer's new address"),
    "message_malformed": Event(logging.WARNING, "a message could not be decoded"),
    "key_unknown": Event(logging.WARNING, "a connection used a key that fleet.toml does not list"),
    "handshake_failed": Event(logging.WARNING, "a connection failed the CURVE handshake"),
    "reload": Event(logging.INFO, "the device serves the bundle and fleet.toml that it read again"),
    "reload_refused": Event(logging.WARNING, "bundle or fleet.toml failed a check; the device keeps the old ones"),
    "selftest_failed": Event(logging.ERROR, "the bundle fails its self-test here and is served because of --force"),
    "class_mix_unsaved": Event(logging.WARNING, "the class mix could not be written"),
    "class_mix_unreadable": Event(logging.WARNING, "the saved class mix cannot be read and is learned again"),
    "leaving": Event(logging.INFO, "the device shuts down and finishes its open requests"),
    "bug": Event(logging.ERROR, "an unexpected exception; the device goes on. Please report it"),
}
"""Event -> its level and meaning. Every event of the log is listed here; others raise KeyError."""

logging.getLogger(LOGGER).addHandler(logging.NullHandler())  # else Python prints warnings to stderr by default


class Log(ABC):
    """Where a device's events go.

    `log(event, text, peer=..., **fields)`: the event is a key of EVENTS; the peer and further fields are data of their
    own, so that a machine can group by them.
    """

    def __init__(self, device: str) -> None:
        """device: the name that every event carries."""
        self.device = device
        self._logged_at: dict[tuple[str, str], float] = {}
        self._suppressed: Counter[tuple[str, str]] = Counter()

    def __call__(self, event: str, text: str = "", *, peer: str = "", **fields: object) -> None:
        """Log an event now. KeyError when EVENTS does not list it."""
        level = EVENTS[event].level
        if peer:
            fields = {"peer": peer, **fields}
        parts = [part for part in (peer, text) if part]
        line = printable(f"{self.device} {event}{': ' if parts else ''}{': '.join(parts)}")
        self.write(level, event, text, line, fields)

    def rarely(self, event: str, text: str = "", *, peer: str = "", **fields: object) -> None:
        """Log an event at most once a minute per event and peer; the next line says how many were left out.

        For events that outsiders can cause as often as they like.
        """
        now, key = time.monotonic(), (event, peer)
        if now - self._logged_at.get(key, -_REPEAT_S) < _REPEAT_S:
            self._suppressed[key] += 1
            return
        self._logged_at[key] = now
        held = self._suppressed.pop(key, 0)
        more = f" ({held} more in the last minute)" if held else ""
        self(event, text + more, peer=peer, held=held, **fields)

    @abstractmethod
    def write(self, level: int, event: str, text: str, line: str, fields: dict[str, object]) -> None:
        """Output one event. line: device, event, peer and text on one printable line; text: as it came."""


class StderrLog(Log):
    """One line per event on stderr, for people or as JSON. A stderr that cannot be written is ignored."""

    def __init__(self, device: str, as_json: bool = False) -> None:
        super().__init__(device)
        self._as_json = as_json
        self._lock = threading.Lock()

    def write(self, level: int, event: str, text: str, line: str, fields: dict[str, object]) -> None:  # noqa: ARG002
        if self._as_json:
            record = {"time": round(time.time(), 3), "device": self.device, "event": event}
            if text:
                record["text"] = text
            output = json.dumps({**record, **fields})
        else:
            output = f"{time.strftime('%H:%M:%S')} {line}"
        # OSError: the disk is full; ValueError: stderr is closed; AttributeError: there is no stderr.
        with self._lock, suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(output + "\n")
            sys.stderr.flush()


class LoggingLog(Log):
    """Records of the logger "nmoe". Their `extra` holds device, event and the fields of the event, such as peer."""

    def write(self, level: int, event: str, text: str, line: str, fields: dict[str, object]) -> None:  # noqa: ARG002
        logger = logging.getLogger(LOGGER)
        try:
            logger.log(level, "%s", line, extra={"device": self.device, "event": event, **fields})
        except Exception as error:  # noqa: BLE001  # of the application's factory, filter or handler: the device goes on
            with suppress(Exception):
                logger.log(level, "%s (without its fields: %r)", line, error)
