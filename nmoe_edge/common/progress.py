"""Progress on stderr: on a terminal one line that is rewritten in place, elsewhere a line now and then.

A library function takes any `Progress` callable and passes it lines of text. Commands pass a `ProgressLine`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

Progress = Callable[[str], None]
"""Receives each line of progress. A line that is a `Count` replaces the `Count` before it."""
_CLEAR = "\r\x1b[K"


class Count(str):
    """A line of a series that counts up, such as `device 3 of 10 written`."""

    __slots__ = ("last",)
    last: bool
    """Whether this line ends the series."""

    def __new__(cls, text: str, number: int, total: int) -> Count:
        """Fill the `{}` in `text` with `number of total`."""
        count = super().__new__(cls, text.format(f"{number} of {total}"))
        count.last = number == total
        return count


class ProgressLine:
    """Writes progress to stderr.

    On a terminal each update overwrites the one before it. Elsewhere, for example in a log file, an update is written
    when the last one is at least `every_s` seconds old. The last update of a series is always written.
    """

    def __init__(self, every_s: float = math.inf) -> None:
        self._every_s = every_s
        self._written_at = -math.inf
        self._cursor_in_line = False
        self._pending: str | None = None
        """The newest update that was not written."""

    def __call__(self, line: str) -> None:
        """Show a line of progress: a `Count` as an update, any other text as a line of its own."""
        if isinstance(line, Count):
            self.update(line, last=line.last)
        else:
            self.end()
            _write(f"{line}\n")

    def update(self, line: str, last: bool) -> None:
        """Show `line` in place of the previous update; `last` ends the series."""
        if sys.stderr.isatty():
            _write(f"{_CLEAR}{line}\n" if last else f"{_CLEAR}{line}")
            self._cursor_in_line = not last
            return
        now = time.monotonic()
        if last or now - self._written_at > self._every_s:
            _write(f"{line}\n")
            self._written_at = now
            self._pending = None
        else:
            self._pending = line

    def end(self) -> None:
        """End an unfinished series, so that the next output starts on a line of its own."""
        if self._cursor_in_line:
            _write("\n")
        elif self._pending is not None:
            _write(f"{self._pending}\n")
        self._cursor_in_line = False
        self._pending = None


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
