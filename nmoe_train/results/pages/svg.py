"""SVG elements for charts: every attribute and text is escaped here. Leaves all geometry to plane, grid and charts.

Each drawing is an inline <svg> of an HTML page and takes the page's text colour. A file of its own would also need the
xmlns attribute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from nmoe_edge.common.text import printable

COLOURS = ("#2f7ed8", "#d1601f", "#23936b", "#a35ccb", "#8a7a1f", "#cf4a7f")
"""One per series. Each has a contrast of at least 3:1 with the light page and with the dark one."""
DASHES = ("none", "8 4", "2 3", "10 3 2 3", "4 2", "16 4")
"""One per series, so that lines differ without colour."""
WIDTH = 460
"""Width of a drawing: two fit side by side on a desktop, and the text stays readable on a phone."""
LETTER = 6.8
"""Upper estimate of the average letter width at font size 12."""


def escape_text(value: Any) -> Markup:
    """`value` as text of a page: markup is escaped, unprintable characters become spaces. Markup passes unchanged."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def element(name: str, *children: Markup, **attributes: str | float) -> Markup:
    """<name attributes>children</name>. `text_anchor` becomes text-anchor, `class_` becomes class."""
    opening = name
    for key, value in attributes.items():
        text = escape_text(value) if isinstance(value, str) else _number(value)
        opening += f' {key.rstrip("_").replace("_", "-")}="{text}"'
    if not children:
        return Markup(f"<{opening}/>")  # noqa: S704  # every attribute is escaped above
    return Markup(f"<{opening}>{join(children)}</{name}>")  # noqa: S704  # and children are markup already


def drawing(width: float, height: float, content: Markup, caption: str) -> Markup:
    """A whole <svg>. Screen readers read the caption."""
    return element(
        "svg",
        content,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        aria_label=caption,
        font_family="system-ui, sans-serif",
        font_size=12,
        fill="currentColor",
    )


def message(text: str, caption: str) -> Markup:
    """A drawing that holds one line of text, where there is nothing to draw."""
    return drawing(WIDTH, 60, label(WIDTH / 2, 34, text), caption)


def group(content: Markup, hover: str) -> Markup:
    """Elements with a tooltip."""
    return element("g", content, element("title", escape_text(hover)))


def label(x: float, y: float, text: str, anchor: str = "middle", colour: str = "", upright: bool = False) -> Markup:
    """Text at a point; `upright` turns it by 90 degrees to read from bottom to top."""
    options = {"fill": colour} if colour else {}
    if upright:
        options["transform"] = f"rotate(-90 {x:.1f} {y:.1f})"
    return element("text", escape_text(text), x=x, y=y, text_anchor=anchor, **options)


def rect(x: float, y: float, width: float, height: float, fill: str, **options: str | float) -> Markup:
    return element("rect", x=x, y=y, width=width, height=height, fill=fill, **options)


def polyline(points: Sequence[tuple[float, float]], series: int) -> Markup:
    """A line in the colour and dashes of a series."""
    return element(
        "polyline",
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        fill="none",
        stroke=colour_of(series),
        stroke_width=2,
        stroke_dasharray=DASHES[series % len(DASHES)],
    )


def dot(x: float, y: float, series: int, radius: float) -> Markup:
    """A disc for the first series, a ring around it for every other."""
    colour = colour_of(series)
    if series == 0:
        return element("circle", cx=x, cy=y, r=radius, fill=colour)
    return element("circle", cx=x, cy=y, r=radius + 1, fill="none", stroke=colour, stroke_width=1.5)


def colour_of(series: int) -> str:
    return COLOURS[series % len(COLOURS)]


def shorten(name: str, longest: int = 14) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def text_width(names: Sequence[str]) -> float:
    """Width of the longest shortened name."""
    return LETTER * max((len(shorten(name)) for name in names), default=1)


def _number(value: float) -> str:
    """At most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
