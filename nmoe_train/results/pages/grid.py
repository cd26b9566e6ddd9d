"""The cells of a heat map: where they lie, the names around them, and their colours by day and by night."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nmoe_train.results.pages.plane import spaced
from nmoe_train.results.pages.svg import WIDTH, element, group, join, label, rect, text_width

DAY = ((247, 250, 253), (92, 160, 212), (8, 48, 107))
"""Colours on a light page, from share 0 to 1: each darker than the last, so that a grey printer keeps the order."""
NIGHT = ((25, 30, 37), (38, 96, 158), (196, 223, 251))
"""Colours on a dark page: each lighter than the last."""
LEVELS = 40
"""Number of colour steps between share 0 and 1."""
LEGEND = (0, 0.01, 0.05, 0.2, 0.5, 1)
"""Shares that the legend shows."""
LEGEND_STEP = 46
"""Width of one colour of the legend."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Positions of the cells of a matrix and of the names around them."""

    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str]
    """What a row is, and what a column is."""
    left: float
    top: float
    width: float
    """Of a cell."""
    height: float
    """Of a cell."""
    upright: bool
    """Whether the names of columns are turned, because they are wider than a column."""

    @classmethod
    def fit(cls, rows: Sequence[str], columns: Sequence[str], axes: tuple[str, str]) -> Grid:
        """The grid that fills the width of a drawing."""
        left = 26 + text_width(rows)
        widest = text_width(columns)
        available = (WIDTH - 6 - left) / max(len(columns), 1)
        width = min(max(44, widest + 8), available)
        height = min(28, 420 / max(len(rows), 1))
        upright = widest + 4 > max(width, 26)
        top = 24 + (widest if upright else 14)
        return cls(rows, columns, axes, left, top, width, height, upright)

    @property
    def right(self) -> float:
        return self.left + len(self.columns) * self.width

    @property
    def bottom(self) -> float:
        return self.top + len(self.rows) * self.height

    def cell(self, row: int, column: int, share: float, text: str, hover: str) -> Markup:
        """A coloured cell with an optional number in it and a tooltip."""
        x = self.left + column * self.width
        y = self.top + row * self.height
        drawn = coloured(x, y, self.width, self.height, share)
        if text:
            ink = _ink(_shade(_level(share)))
            drawn += label(x + self.width / 2, y + self.height / 2 + 4, text, colour=ink)
        row_axis, column_axis = self.axes
        return group(drawn, f"{row_axis} {self.rows[row]}, {column_axis} {self.columns[column]}: {hover}")

    def names(self) -> Markup:
        """The names of the axes, of the rows and of the columns; some are left out where they would touch."""
        row_axis, column_axis = self.axes
        drawn = [
            label(self.left, 12, column_axis, "start"),
            label(11, (self.top + self.bottom) / 2, row_axis, upright=True),
        ]
        for row, name in spaced(self.rows, self.height, 13).items():
            y = self.top + (row + 0.5) * self.height + 4
            drawn.append(label(self.left - 6, y, name, "end"))
        for column, name in spaced(self.columns, self.width, 13 if self.upright else None).items():
            x = self.left + (column + 0.5) * self.width
            if self.upright:
                drawn.append(label(x + 4, self.top - 6, name, "start", upright=True))
            else:
                drawn.append(label(x, self.top - 6, name))
        return join(drawn)

    def legend(self, texts: Sequence[str], shares: Sequence[float]) -> Markup:
        """Colours under the grid, each above its text."""
        y = self.bottom + 12
        colours = []
        words = []
        for i, (text, share) in enumerate(zip(texts, shares, strict=True)):
            x = self.left + LEGEND_STEP * i
            colours.append(coloured(x, y, LEGEND_STEP, 10, share))
            words.append(label(x + LEGEND_STEP / 2, y + 24, text))
        # In a <g> of their own: `night_style` colours a text that follows a rectangle as a number on that rectangle.
        return join([*colours, element("g", *words)])


def coloured(x: float, y: float, width: float, height: float, share: float) -> Markup:
    """A rectangle in the day colour of a share; its class gives it the night colour, see `night_style`."""
    level = _level(share)
    return rect(x, y, width, height, _shade(level), class_=f"k{level}")


def night_style() -> Markup:
    """CSS: the colours of heat maps on a dark page, and black or white for the numbers on them."""
    rules = ""
    for level in range(LEVELS + 1):
        fill = _shade(level, NIGHT)
        rules += f".k{level} {{ fill: {fill} }} .k{level} + text {{ fill: {_ink(fill)} }}\n"
    return Markup(f"@media screen and (prefers-color-scheme: dark) {{\n{rules}}}\n")  # noqa: S704  # numbers and colours


def _level(share: float) -> int:
    """The colour step of a share in 0..1. Steps follow the square root, so that 1 % differs visibly from 0."""
    return round(LEVELS * math.sqrt(min(max(share, 0.0), 1.0)))


def _shade(level: int, scale: Sequence[Sequence[int]] = DAY) -> str:
    """#rrggbb of a level, interpolated between the colours of the scale."""
    position = level / LEVELS * (len(scale) - 1)
    i = min(int(position), len(scale) - 2)
    between = position - i
    channels = [round(low + (high - low) * between) for low, high in zip(scale[i], scale[i + 1], strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _ink(cell: str) -> str:
    """Black or white: the one with more contrast on the colour `cell`, by the relative luminance of WCAG."""
    channels = [int(cell[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 >= 1.05 * 0.05 else "#ffffff"
