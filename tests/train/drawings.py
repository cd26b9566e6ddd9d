"""What stands in pictures, for tests of charts and of pages."""

from __future__ import annotations

import re
from xml.etree import ElementTree


def pictures(text):
    """Every <svg> by what it is said to show."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {svg.get("aria-label"): svg for svg in found}


def hovers(svg):
    return [title.text for title in svg.iter("title")]


def texts(svg):
    return [text.text for text in svg.iter("text")]


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def cells(svg):
    """{(row, column): what hovers over it} of a heat map."""
    return {tuple(re.findall(r"\w+ (\w+)[,:]", text)): text.split(": ")[1] for text in hovers(svg)}


def drawn_cells(svg):
    """[(the rectangle, the number in it or None)] of a heat map."""
    return [(cell.find("rect"), cell.find("text")) for cell in svg.iter("g") if cell.find("title") is not None]
