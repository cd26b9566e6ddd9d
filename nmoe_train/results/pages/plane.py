"""Axes of a chart: ticks, labels, shaded bands, the legend, and where a value lies in the drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nmoe_train.results.pages.svg import LETTER, WIDTH, element, join, label, rect, shorten, text_width

ABOVE = 20
"""Height between the legend and the plane, for the y label and the names of bands."""
BELOW = 42
"""Height under the plane, for the x ticks and the x label."""


@dataclass(frozen=True, slots=True)
class Plane:
    """The rectangle that holds a chart's points. `top` is where its legend ends."""

    top: float
    x_low: float
    x_high: float
    y_ticks: Sequence[float]
    left: float = 54
    right: float = WIDTH - 20
    height: float = 170
    log: bool = False

    @property
    def ceiling(self) -> float:
        """The y coordinate of the largest value."""
        return self.top + ABOVE

    @property
    def floor(self) -> float:
        """The y coordinate of the smallest value."""
        return self.ceiling + self.height

    @property
    def foot(self) -> float:
        """The y coordinate under everything."""
        return self.floor + BELOW

    @property
    def unit(self) -> float:
        """Width of one unit of x."""
        return self.x(1) - self.x(0)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        low = self.y_ticks[0]
        high = self.y_ticks[-1]
        if self.log:
            low, high = math.log10(low), math.log10(high)
            value = math.log10(value)
        return self.ceiling + (high - value) / (high - low) * self.height

    def shaded(self, bands: Mapping[str, tuple[float, float]]) -> Markup:
        """Grey stretches of x with their names above."""
        drawn = []
        for name, (start, end) in bands.items():
            x = self.x(start)
            width = self.x(end) - x
            drawn.append(rect(x, self.ceiling, width, self.height, "currentColor", opacity=".12"))
            drawn.append(label(x + width / 2, self.top + 14, name))
        return join(drawn)

    def axes(self, x_ticks: Mapping[float, str], x_label: str, y_label: str) -> Markup:
        """Both labels, the ticks of x, and a line across for every tick of y."""
        drawn = [
            label(0, self.top + 10, y_label, "start"),
            label((self.left + self.right) / 2, self.floor + 36, x_label),
        ]
        for value in self.y_ticks:
            y = self.y(value)
            line = f"M{self.left} {y:.1f}H{self.right}"
            drawn.append(element("path", d=line, stroke="currentColor", opacity=".2"))
            drawn.append(label(self.left - 6, y + 4, f"{value:g}", "end"))
        drawn += [label(self.x(value), self.floor + 17, text) for value, text in x_ticks.items()]
        return join(drawn)


def legend(names: Iterable[str], symbol: Callable[[int, float, float], Markup]) -> tuple[Markup, float]:
    """The symbol and name of each series in lines of text, and the y coordinate under the last line.

    symbol: (series, x, y) -> what stands left of the series' name
    """
    drawn = []
    x = 0.0
    y = 13.0
    for series, name in enumerate(names):
        shown = shorten(name, 60)
        width = 32 + LETTER * len(shown) + 14
        if x > 0 and x + width > WIDTH:
            x = 0.0
            y += 18
        drawn += [symbol(series, x, y - 4), label(x + 32, y, shown, "start")]
        x += width
    return join(drawn), y + 8


def span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value; widened when they are equal, because a plane needs an extent."""
    low = min(values)
    high = max(values)
    equal = high - low <= 1e-9 * max(abs(low), abs(high))
    margin = (abs(low) / 10 or 0.5) if equal else 0.0
    return low - margin, high + margin


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers that cover low..high; `whole` keeps them integers."""
    wanted = (high - low) / 5
    power = 10 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    if whole:
        step = max(step, 1)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def powers_of_ten(values: Sequence[float]) -> list[float]:
    """At least two powers of ten that cover the values."""
    first = math.floor(math.log10(min(values)) + 1e-9)
    last = math.ceil(math.log10(max(values)) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def spaced(names: Sequence[str], unit: float, needed: float | None = None) -> dict[float, str]:
    """{position: name} for every name, every second, every fifth… as many as fit without touching.

    unit: width between two positions
    needed: width of a name; None measures the longest
    """
    if needed is None:
        needed = text_width(names) + 6
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * unit >= needed), 200)
    return {position: shorten(name) for position, name in enumerate(names) if position % step == 0}
