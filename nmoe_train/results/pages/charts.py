"""Charts as inline SVG: heat maps, curves, dots, bars and stacked bars. Knows nothing of runs.

Every chart takes its caption, which screen readers read; `figure` puts the same caption below the chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from nmoe_train.results.pages.grid import LEGEND, LEGEND_STEP, Grid
from nmoe_train.results.pages.plane import Plane, legend, powers_of_ten, spaced, span, ticks
from nmoe_train.results.pages.svg import (
    COLOURS,
    LETTER,
    WIDTH,
    colour_of,
    dot,
    drawing,
    element,
    group,
    join,
    message,
    polyline,
    rect,
)

Points = Sequence[tuple[float, float]]
Bands = Mapping[str, tuple[float, float]]
NO_BANDS: Bands = MappingProxyType({})
WIDEST_BAR = 44
BAR_LENGTH = 160
"""Length in pixels of the longest bar in a table."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and the caption below it. Templates draw it with the macro `figure` or `pictures`."""

    drawing: Markup
    caption: str


def figure(draw: Callable[..., Markup], *data: Any, caption: str, **options: Any) -> Figure:
    """One of the charts below with its caption."""
    return Figure(draw(*data, caption=caption, **options), caption)


def heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    caption: str,
    *,
    axes: tuple[str, str] = ("device", "expert"),
    largest: float | None = None,
) -> Markup:
    """A matrix of shares in 0..1, darker for more. Cells that are large enough show their percentage.

    axes: what a row is, and what a column is
    largest: the largest cell, where cells are counts instead of shares
    """
    if largest is None:
        top = 1.0
        scale = 100
        unit = " %"
    else:
        top = max(largest, 1)
        scale = 1
        unit = ""
    values = [[finite_number(value) or 0.0 for value in row] for row in matrix]

    grid = Grid.fit(rows, columns, axes)
    longest_text = max((len(f"{scale * value:.0f}") for row in values for value in row), default=0)
    numbers_fit = grid.width >= LETTER * max(longest_text, 2) + 3 and grid.height >= 15
    cells = []
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            text = f"{scale * value:.0f}" if numbers_fit else ""
            cells.append(grid.cell(r, c, value / top, text, f"{scale * value:.4g}{unit}"))

    # Small counts round to the same text; the legend shows each text once.
    shares = {f"{scale * top * share:.0f}{unit}": share for share in LEGEND}
    legend_drawn = grid.legend(list(shares), list(shares.values()))
    width = max(grid.right, grid.left + LEGEND_STEP * len(shares)) + 6
    return drawing(width, grid.bottom + 42, join([grid.names(), *cells, legend_drawn]), caption)


def curves(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    log: bool = False,
    bands: Bands = NO_BANDS,
) -> Markup:
    """A line through the points (x, y) of each series. Values that are not finite numbers are skipped.

    log: the y axis shows powers of ten, and values that are not positive are skipped
    bands: stretches of x to shade, by the name to write above them
    """
    lines = {name: _drawable(points, log) for name, points in series.items()}
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    if not xs:
        return message("no points", caption)

    low, high = span(xs)
    whole = all(x == int(x) for x in xs)
    x_ticks = {tick: f"{tick:g}" for tick in ticks(low, high, whole) if low <= tick <= high}
    y_ticks = powers_of_ten(ys) if log else ticks(*span(ys))

    legend_drawn, top = legend(lines, lambda i, x, y: polyline([(x, y), (x + 26, y)], i))
    plane = Plane(top, low, high, y_ticks, log=log)
    drawn = [legend_drawn, plane.shaded(bands), plane.axes(x_ticks, x_label, y_label)]
    for i, (name, line) in enumerate(lines.items()):
        drawn.append(group(_curve(plane, line, i), f"{name}: {_ends(line)}"))
    return drawing(WIDTH, plane.foot, join(drawn), caption)


def dots(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    x_label: str,
    caption: str,
    *,
    span: tuple[float, float],
) -> Markup:
    """For each name a dot of every series, shares in 0..1 drawn as percent; a stem joins the dots of one name.

    span: the smallest and the largest share, so that several charts can have one scale
    """
    y_ticks = _percent_ticks(*span)
    legend_drawn, top = legend(series, lambda i, x, y: dot(x + 18, y, i, 4))
    plane = Plane(top, -0.5, len(names) - 0.5, y_ticks)
    radius = min(4.0, plane.unit / 2.5)
    drawn = [legend_drawn, plane.axes(spaced(names, plane.unit), x_label, "percent")]
    for position, name in enumerate(names):
        x = plane.x(position)
        heights = []
        marks = []
        hover = []
        for i, (key, shares) in enumerate(series.items()):
            if position < len(shares):
                percent = 100 * shares[position]
                y = plane.y(percent)
                heights.append(y)
                marks.append(dot(x, y, i, radius))
                hover.append(f"{key} {percent:.1f} %")
        if heights:
            stem = f"M{x:.1f} {min(heights):.1f}V{max(heights):.1f}"
            marks.insert(0, element("path", d=stem, stroke="currentColor", opacity=".5"))
        drawn.append(group(join(marks), f"{x_label} {name}: {', '.join(hover)}"))
    return drawing(WIDTH, plane.foot, join(drawn), caption)


def bars(shares: Sequence[float], names: Sequence[str], x_label: str, caption: str) -> Markup:
    """A bar for each share in 0..1, drawn as percent. A dashed line marks equal shares."""
    percents = [100 * share for share in shares]
    equal = 100 / max(len(percents), 1)
    plane = Plane(0, -0.5, len(percents) - 0.5, ticks(0, max([*percents, equal])))
    width = min(0.8 * plane.unit, WIDEST_BAR)
    drawn = [plane.axes(spaced(names, plane.unit), x_label, "percent")]
    for position, percent in enumerate(percents):
        y = plane.y(percent)
        bar = rect(plane.x(position) - width / 2, y, width, plane.floor - y, COLOURS[0])
        drawn.append(group(bar, f"{x_label} {names[position]}: {percent:.1f} %"))
    drawn.append(polyline([(plane.left, plane.y(equal)), (plane.right, plane.y(equal))], 1))
    return drawing(WIDTH, plane.foot, join(drawn), caption)


def stacks(
    series: Mapping[str, Sequence[float]],
    names: Sequence[str],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    bands: Bands = NO_BANDS,
) -> Markup:
    """For each name one bar with the amounts of all series on top of each other, the first at the bottom.

    bands: as in `curves`, where x is the position of a name
    """
    totals = [sum(amounts) for amounts in zip(*series.values(), strict=True)]
    if not any(totals):
        return message("nothing to show", caption)

    legend_drawn, top = legend(series, lambda i, x, y: rect(x + 6, y - 6, 20, 11, colour_of(i)))
    plane = Plane(top, -0.5, len(names) - 0.5, ticks(0, max(totals)))
    width = min(0.8 * plane.unit, WIDEST_BAR) if plane.unit > 8 else plane.unit  # very narrow bars touch
    drawn = [legend_drawn, plane.shaded(bands), plane.axes(spaced(names, plane.unit), x_label, y_label)]
    for position, name in enumerate(names):
        left = plane.x(position) - width / 2
        parts = []
        hover = []
        height = 0.0
        for i, (key, amounts) in enumerate(series.items()):
            amount = amounts[position]
            if amount:
                y = plane.y(height + amount)
                parts.append(rect(left, y, width, plane.y(height) - y, colour_of(i)))
                hover.append(f"{key} {amount:.4g}")
            height += amount
        if parts:
            drawn.append(group(join(parts), f"{x_label} {name}: {', '.join(hover)}"))
    return drawing(WIDTH, plane.foot, join(drawn), caption)


def table_bar(value: float, largest: float) -> Markup:
    """A bar for a cell of a table; the number stands in the cell next to it."""
    length = max(1, round(BAR_LENGTH * value / largest)) if largest > 0 else 1
    bar = element("rect", width=length, height=10, fill=COLOURS[0])
    # The viewBox lets a narrow page shrink bars instead of clipping them.
    view_box = f"0 0 {BAR_LENGTH} 10"
    return element("svg", bar, viewBox=view_box, width=BAR_LENGTH, height=10, aria_hidden="true")


def finite_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _drawable(points: Iterable[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    """The points that can be drawn, thinned out where there are very many."""
    kept = []
    for x, y in points:
        known = finite_number(x) is not None and finite_number(y) is not None
        if known and (y > 0 or not log):
            kept.append((float(x), float(y)))
    return _thin_out(kept)


def _thin_out(points: list[tuple[float, float]], max_points: int = 400) -> list[tuple[float, float]]:
    """About `max_points` points: the lowest and the highest of each stretch, so that every peak stays."""
    if len(points) <= max_points:
        return points
    stretch = math.ceil(2 * len(points) / max_points)
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
    return [*kept, points[-1]]


def _curve(plane: Plane, line: Points, series: int) -> Markup:
    """A line through the points; a single point becomes a short horizontal line."""
    positions = [(plane.x(x), plane.y(y)) for x, y in line]
    if len(positions) == 1:
        ((x, y),) = positions
        positions = [(x - 13, y), (x + 13, y)]
    return polyline(positions, series)


def _ends(line: Points) -> str:
    """The first and the last point as text: 4 at 1, 3 at 5."""
    first_and_last = [line[0], line[-1]] if len(line) > 1 else line
    return ", ".join(f"{y:.4g} at {x:g}" for x, y in first_and_last)


def _percent_ticks(smallest: float, largest: float) -> list[float]:
    return [tick for tick in ticks(*span([100 * smallest, 100 * largest])) if 0 <= tick <= 100]
