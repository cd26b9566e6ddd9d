"""Read charts back: texts, tooltips, points and cells of an SVG, for tests of charts and pages."""

from __future__ import annotations

import re
from xml.etree import ElementTree


def pictures(text):
    """{caption: <svg>} of a page."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {svg.get("aria-label"): svg for svg in found}


def hovers(svg):
    """The tooltips."""
    return [title.text for title in svg.iter("title")]


def texts(svg):
    return [text.text for text in svg.iter("text")]


def points(line):
    """[(x, y)] of a polyline."""
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def cells(svg):
    """{(row, column): value} of a heat map, from its tooltips."""
    return {tuple(re.findall(r"\w+ (\w+)[,:]", text)): text.split(": ")[1] for text in hovers(svg)}


def drawn_cells(svg):
    """[(<rect>, <text> or None)] of a heat map: each cell and the number in it."""
    return [(cell.find("rect"), cell.find("text")) for cell in svg.iter("g") if cell.find("title") is not None]
