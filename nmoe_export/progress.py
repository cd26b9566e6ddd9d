"""What is said while an export works."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

Say = Callable[[str], None]
"""Takes a line of progress, which may be a Count."""


class Count(str):
    """A line that only counts: each takes the place of the one before it."""

    __slots__ = ("last",)

    def __new__(cls, what: str, number: int, total: int) -> Count:
        """what: with a place {} for `3 of 10`"""
        count = super().__new__(cls, what.format(f"{number} of {total}"))
        count.last = number == total
        return count

    last: bool
    """Whether no other follows."""


class Terminal:
    """Lines on stderr; those that count are one line that changes on a terminal, and the last of them elsewhere."""

    def __init__(self) -> None:
        self._open = False
        self._kept: str | None = None

    def __call__(self, line: str) -> None:
        """Say it."""
        if not isinstance(line, Count) or line.last:
            if not isinstance(line, Count):
                self.end()
            click.echo(f"\r\x1b[K{line}" if self._open else line, err=True)
            self._open, self._kept = False, None
        elif sys.stderr.isatty():
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)
            self._open = True
        else:
            self._kept = line

    def end(self) -> None:
        """Nothing more is counted: what comes next, an error perhaps, has a line of its own."""
        if self._open:
            click.echo("", err=True)
        elif self._kept is not None:
            click.echo(self._kept, err=True)
        self._open, self._kept = False, None
