"""Numbers as text, and lines of cells as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from nmoe_edge.common.text import one_line

DASH = "–"
"""Stands for an unknown value."""


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well on a terminal; columns of dashes alone are left out."""
    columns = [_pad(column) for column in zip(heads, *lines, strict=True) if set(column[1:]) != {DASH}]
    shown = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    rule = "|".join("-" * (len(column[0]) + 2) for column in columns)
    shown.insert(1, f"|{rule}|")
    return "\n".join(shown)


def _pad(column: Sequence[str]) -> list[str]:
    """The cells of a column, all of the same width."""
    cells = [one_line(text).replace("|", "/") for text in column]
    width = max(3, *map(len, cells))
    return [cell.ljust(width) for cell in cells]


def dashed(value: object, form: str = "") -> str:
    """A value as text; a dash for None."""
    return DASH if value is None else format(value, form)


def milliseconds(ns: float | None) -> str:
    """Nanoseconds as milliseconds with three significant digits and no exponent."""
    if ns is None:
        return DASH
    ms = ns / 1e6
    if 0 < abs(ms) < 0.1:
        decimals = 2 - math.floor(math.log10(abs(ms)))
        return f"{ms:.{decimals}f}"
    return f"{ms:.3f}" if abs(ms) < 10 else f"{ms:.1f}"


def mebibytes(sizes: Sequence[int | None]) -> str:
    """Median of sizes in bytes, as MiB; a dash if any is unknown."""
    known = [size for size in sizes if size is not None]
    return f"{median(known) / 2**20:.1f}" if known and len(known) == len(sizes) else DASH
