"""Charts as inline SVG: heat maps, curves, dots and bars, for pages that open anywhere. Knows nothing of runs.

Each is one <svg> for a page of HTML, its text in the colour of the text around it; a file of its own would still need
the xmlns, which a page does without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from operator import itemgetter
from types import MappingProxyType
from typing import Any

COLOURS = ("#2f7ed8", "#d1601f", "#23936b", "#a35ccb", "#8a7a1f", "#cf4a7f")
"""Of series. Each has a contrast of 3:1 or more with a white page and with a dark one."""
DASHES = ("none", "8 4", "2 3", "10 3 2 3", "4 2", "16 4")
DAY = ((247, 250, 253), (92, 160, 212), (8, 48, 107))
"""A heat map's colours, from nothing to everything: always darker, so that they survive a grey printer."""
NIGHT = ((25, 30, 37), (38, 96, 158), (196, 223, 251))
"""The same on a dark page: always lighter."""
LEVELS = 40
"""Into which a heat map's shares fall."""
STEPS = (0, 0.01, 0.05, 0.2, 0.5, 1)
"""What the legend of a heat map shows."""
WIDTH = 460
"""Of a picture: two stand side by side on a desk, and on a phone its text is still read."""
LETTER = 6.8
"""How wide a letter of size 12 is, on average and at most."""


def heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    caption: str,
    *,
    axes: tuple[str, str] = ("device", "expert"),
    largest: float | None = None,
) -> str:
    """A matrix of shares in 0..1, darker for more, with the percentage in each cell where there is room.

    axes: what a row is, and what a column is
    largest: of the cells, when they are counts and not shares
    """
    top, unit, sign = (1.0, 100, " %") if largest is None else (max(largest, 1), 1, "")
    values = [[measured(value) or 0.0 for value in row] for row in matrix]
    grid = _Grid.fit(rows, columns, axes)
    longest = max((len(f"{unit * value:.0f}") for row in values for value in row), default=0)
    roomy = grid.width >= LETTER * max(longest, 2) + 3 and grid.height >= 15
    cells = "".join(
        grid.cell(r, c, value / top, f"{unit * value:.0f}" if roomy else "", f"{unit * value:.4g}{sign}")
        for r, row in enumerate(values)
        for c, value in enumerate(row)
    )
    x, y, step = grid.left, grid.top + len(rows) * grid.height + 12, 46
    steps = {f"{unit * top * share:.0f}": share for share in STEPS}
    keys = "".join(_cell(x + step * i, y, step, 10, _level(share)) + "/>" for i, share in enumerate(steps.values()))
    words = "".join(_label(x + step * (i + 0.5), y + 24, text + sign) for i, text in enumerate(steps))
    width = x + max(len(columns) * grid.width, step * len(steps)) + 6
    return _svg(width, y + 30, f"{grid.names()}{cells}{keys}<g>{words}</g>", caption)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    log: bool = False,
    bands: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """Lines through (x, y), told apart by colour and by dashes; what is no number is no point.

    log: each step up is ten times as much, and what is not over zero is no point
    bands: stretches of x that are shaded, by the name that stands over them
    """
    lines = {
        name: _thinned((x, y) for x, y in points if not log or (measured(y) or 0) > 0)
        for name, points in series.items()
    }
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    if not xs:
        return _svg(WIDTH, 60, _label(WIDTH / 2, 34, "no points"), caption)
    legend, top = _legend(lines, lambda i, x, y: _line([(x, y), (x + 26, y)], i))
    low, high = _span(xs)
    ticks = {x: f"{x:g}" for x in _ticks(low, high, whole=all(x == int(x) for x in xs)) if low <= x <= high}
    plane = _Plane(top, low, high, _powers(ys) if log else _ticks(*_span(ys)), log=log)
    drawing = [legend, plane.shaded(bands), plane.axes(ticks, x_label, y_label)]
    for i, (name, line) in enumerate(lines.items()):
        places = [(plane.x(x), plane.y(y)) for x, y in line]
        shown = places if len(places) > 1 else [(x + side, y) for x, y in places for side in (-13, 13)]
        ends = ", ".join(f"{y:.4g} at {x:g}" for x, y in (*line[:1], *line[1:][-1:]))
        drawing.append(f"<g>{_line(shown, i)}<title>{escaped(f'{name}: {ends}')}</title></g>")
    return _svg(WIDTH, plane.foot, "".join(drawing), caption)


def dots(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    x_label: str,
    caption: str,
    *,
    span: tuple[float, float],
) -> str:
    """For each name a dot of every series, shares in 0..1 drawn as percent; a stem joins those of one name.

    span: the least and the largest share, so that two pictures can have one scale
    """
    legend, top = _legend(series, lambda i, x, y: _dot(x + 18, y, i, 4))
    ticks = [tick for tick in _ticks(*_span([100 * share for share in span])) if 0 <= tick <= 100]
    plane = _Plane(top, -0.5, len(names) - 0.5, ticks)
    drawing = [legend, plane.axes(_spaced(names, plane.room), x_label, "percent")]
    for place, name in enumerate(names):
        here = {key: (i, 100 * shares[place]) for i, (key, shares) in enumerate(series.items()) if place < len(shares)}
        x, ys = plane.x(place), [plane.y(percent) for _, percent in here.values()]
        stem = f'<path d="M{x:.1f} {min(ys):.1f}V{max(ys):.1f}" stroke="currentColor" opacity=".5"/>' if ys else ""
        marks = "".join(_dot(x, y, i, min(4.0, plane.room / 2.5)) for y, (i, _) in zip(ys, here.values(), strict=True))
        hover = ", ".join(f"{key} {percent:.1f} %" for key, (_, percent) in here.items())
        drawing.append(f"<g>{stem}{marks}<title>{escaped(f'{x_label} {name}: {hover}')}</title></g>")
    return _svg(WIDTH, plane.foot, "".join(drawing), caption)


def bars(shares: Sequence[float], names: Sequence[str], x_label: str, caption: str) -> str:
    """A bar for each share in 0..1, drawn as percent; a dashed line stands where all would be equal."""
    percents = [100 * share for share in shares]
    equal = 100 / max(len(percents), 1)
    plane = _Plane(0, -0.5, len(percents) - 0.5, _ticks(0, max([*percents, equal])))
    drawing = [plane.axes(_spaced(names, plane.room), x_label, "percent")]
    width = min(0.8 * plane.room, 44)
    for place, percent in enumerate(percents):
        bar = _rect(plane.x(place) - width / 2, plane.y(percent), width, plane.y(0) - plane.y(percent), COLOURS[0])
        drawing.append(f"{bar}><title>{escaped(f'{x_label} {names[place]}: {percent:.1f} %')}</title></rect>")
    drawing.append(_line([(plane.left, plane.y(equal)), (plane.right, plane.y(equal))], 1))
    return _svg(WIDTH, plane.foot, "".join(drawing), caption)


def stacks(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    bands: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """For each name a bar of all series' amounts, the first at the bottom; bands as in curves, in places of names."""
    sums = [sum(amounts) for amounts in zip(*series.values(), strict=True)]
    if not any(sums):
        return _svg(WIDTH, 60, _label(WIDTH / 2, 34, "nothing to show"), caption)
    legend, top = _legend(series, lambda i, x, y: _rect(x + 6, y - 6, 20, 11, COLOURS[i % len(COLOURS)]) + "/>")
    plane = _Plane(top, -0.5, len(names) - 0.5, _ticks(0, max(sums)))
    drawing = [legend, plane.shaded(bands), plane.axes(_spaced(names, plane.room), x_label, y_label)]
    width = min(0.8 * plane.room, 44) if plane.room > 8 else plane.room
    for place, name in enumerate(names):
        floor, bar = 0.0, ""
        for i, amounts in enumerate(series.values()):
            low, floor = floor, floor + amounts[place]
            left, high = plane.x(place) - width / 2, plane.y(floor)
            if amounts[place]:
                bar += _rect(left, high, width, plane.y(low) - high, COLOURS[i % len(COLOURS)]) + "/>"
        hover = ", ".join(f"{key} {amounts[place]:.4g}" for key, amounts in series.items() if amounts[place])
        drawing.append(f"<g>{bar}<title>{escaped(f'{x_label} {name}: {hover}')}</title></g>" if bar else "")
    return _svg(WIDTH, plane.foot, "".join(drawing), caption)


def figure(draw: Callable[..., str], *data: Any, caption: str, **options: Any) -> str:
    """One of the charts above, and under it what it shows."""
    return f"<figure>{draw(*data, caption=caption, **options)}<figcaption>{escaped(caption)}</figcaption></figure>"


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the cells of a matrix lie, and the names around them."""

    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str]
    left: float
    top: float
    width: float
    height: float
    upright: bool
    """Whether the columns' names stand, because they are too long to lie."""

    @classmethod
    def fit(cls, rows: Sequence[str], columns: Sequence[str], axes: tuple[str, str]) -> _Grid:
        left, widest = 26 + _width(rows), _width(columns)
        width = min(max(44, widest + 8), (WIDTH - 6 - left) / max(len(columns), 1))
        upright = widest + 4 > max(width, 26)
        top = 24 + (widest if upright else 14)
        return cls(rows, columns, axes, left, top, width, min(28, 420 / max(len(rows), 1)), upright)

    def cell(self, row: int, column: int, share: float, text: str, hover: str) -> str:
        x, y, level = self.left + column * self.width, self.top + row * self.height, _level(share)
        title = escaped(f"{self.axes[0]} {self.rows[row]}, {self.axes[1]} {self.columns[column]}: {hover}")
        written = _label(x + self.width / 2, y + self.height / 2 + 4, text, colour=_ink(_shade(level))) if text else ""
        return f"<g>{_cell(x, y, self.width, self.height, level)}/>{written}<title>{title}</title></g>"

    def names(self) -> str:
        middle = self.top + len(self.rows) * self.height / 2
        drawn = [_label(self.left, 12, self.axes[1], "start"), _label(11, middle, self.axes[0], turn=True)]
        for place, name in _spaced(self.rows, self.height, 13).items():
            drawn.append(_label(self.left - 6, self.top + (place + 0.5) * self.height + 4, name, "end"))
        for place, name in _spaced(self.columns, self.width, 13 if self.upright else None).items():
            x = self.left + (place + 0.5) * self.width
            anchor, shift = ("start", 4) if self.upright else ("middle", 0)
            drawn.append(_label(x + shift, self.top - 6, name, anchor, turn=self.upright))
        return "".join(drawn)


@dataclass(frozen=True, slots=True)
class _Plane:
    """Where the points of a chart lie: below `top`, which is where its legend ends."""

    top: float
    x_low: float
    x_high: float
    y_ticks: Sequence[float]
    left: float = 54
    right: float = WIDTH - 20
    height: float = 170
    log: bool = False

    @property
    def foot(self) -> float:
        return self.top + 20 + self.height + 42

    @property
    def room(self) -> float:
        return self.x(1) - self.x(0)

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.top + 20 + (high - value) / (high - low) * self.height

    def shaded(self, bands: Mapping[str, tuple[float, float]]) -> str:
        drawn = ""
        for name, (start, end) in bands.items():
            x, width = self.x(start), self.x(end) - self.x(start)
            drawn += _rect(x, self.top + 20, width, self.height, "currentColor") + ' opacity=".12"/>'
            drawn += _label(x + width / 2, self.top + 14, name)
        return drawn

    def axes(self, x_ticks: Mapping[float, str], x_label: str, y_label: str) -> str:
        floor = self.top + 20 + self.height
        drawn = [_label(0, self.top + 10, y_label, "start"), _label((self.left + self.right) / 2, floor + 36, x_label)]
        for value in self.y_ticks:
            y = self.y(value)
            drawn.append(f'<path d="M{self.left} {y:.1f}H{self.right}" stroke="currentColor" opacity=".2"/>')
            drawn.append(_label(self.left - 6, y + 4, f"{value:g}", "end"))
        drawn += [_label(self.x(value), floor + 17, text) for value, text in x_ticks.items()]
        return "".join(drawn)


def _legend(names: Iterable[str], symbol: Callable[[int, float, float], str]) -> tuple[str, float]:
    """The names of series with what stands for each, and where the last line of them ends."""
    drawn, x, y = "", 0.0, 13.0
    for i, name in enumerate(names):
        width = 32 + LETTER * len(_short(name, 60)) + 14
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + 18
        drawn += symbol(i, x, y - 4) + _label(x + 32, y, _short(name, 60), "start")
        x += width
    return drawn, y + 8


def _thinned(points: Iterable[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """The points that are numbers; of very many the lowest and the highest of each stretch, so that no peak is lost."""
    finite = [(float(x), float(y)) for x, y in points if None not in (measured(x), measured(y))]
    if len(finite) <= most:
        return finite
    stretch = math.ceil(2 * len(finite) / most)
    kept = [finite[0]]
    for start in range(0, len(finite), stretch):
        part = finite[start : start + stretch]
        kept += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
    return [*kept, finite[-1]]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest, or somewhat around when they are the same."""
    low, high = min(values), max(values)
    around = (abs(low) / 10 or 0.5) if high - low <= 1e-9 * max(abs(low), abs(high)) else 0.0
    return low - around, high + around


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers, some five of them, from at most `low` to at least `high`."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * round_ for round_ in (1, 2, 5, 10) if power * round_ >= (high - low) / 5 * (1 - 1e-9))
    step = max(step, 1) if whole else step
    return [step * k for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of ten, from at most the least value to at least the largest, two of them or more."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _spaced(names: Sequence[str], room: float, need: float | None = None) -> dict[float, str]:
    """By their places, as many of the names as do not touch: every one, every second, every fifth…"""
    need = _width(names) + 6 if need is None else need
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * room >= need), 200)
    return {place: _short(name) for place, name in enumerate(names) if place % step == 0}


def _svg(width: float, height: float, drawing: str, caption: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escaped(caption)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"{drawing}</svg>"
    )


def _label(x: float, y: float, text: str, anchor: str = "middle", colour: str = "", turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    fill = f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}{turned}>{escaped(text)}</text>'


def _level(share: float) -> int:
    """The level of a share in 0..1; by its root, so that one percent can be told from none."""
    return round(LEVELS * math.sqrt(min(max(share, 0.0), 1.0)))


def _shade(level: int, scale: Sequence[Sequence[int]] = DAY) -> str:
    place = level / LEVELS * (len(scale) - 1)
    i = min(int(place), len(scale) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (place - i)):02x}" for a, b in zip(scale[i], scale[i + 1], strict=True))


def _ink(cell: str) -> str:
    """Black or white, whichever is read better on this colour, by WCAG's relative luminance."""
    parts = [int(cell[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 >= 1.05 * 0.05 else "#ffffff"


def night() -> str:
    """The style that gives heat maps their colours on a dark page, and their texts the ink for those."""
    shades = [_shade(level, NIGHT) for level in range(LEVELS + 1)]
    rules = (f".k{k} {{ fill: {fill} }} .k{k} + text {{ fill: {_ink(fill)} }}\n" for k, fill in enumerate(shades))
    return f"@media screen and (prefers-color-scheme: dark) {{\n{''.join(rules)}}}\n"


def _cell(x: float, y: float, width: float, height: float, level: int) -> str:
    """A cell of a heat map, its tag left open."""
    return f'{_rect(x, y, width, height, _shade(level))} class="k{level}"'


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A rectangle, its tag left open."""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"'


def _line(points: Sequence[tuple[float, float]], series: int) -> str:
    colour, dash = COLOURS[series % len(COLOURS)], DASHES[series % len(DASHES)]
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'


def _dot(x: float, y: float, series: int, radius: float) -> str:
    """A disc for the first series, a ring around it for the others."""
    colour, wide = COLOURS[series % len(COLOURS)], radius + 1 if series else radius
    look = f'fill="none" stroke="{colour}" stroke-width="1.5"' if series else f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{wide:.1f}" {look}/>'


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _width(names: Sequence[str]) -> float:
    return LETTER * max((len(_short(name)) for name in names), default=1)


def escaped(value: Any) -> str:
    """For a page: markup made harmless, and what cannot be printed is a space."""
    return escape("".join(letter if letter.isprintable() else " " for letter in str(value)))


def measured(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    known = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
