"""Jinja2 templates to HTML text. Every value is escaped, and a name that a template misspells is an error.

A page's template lies in the package that fills it and extends templates/base.html of this package.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nmoe_edge.common.text import counted
from nmoe_train.results.pages import formats
from nmoe_train.results.pages.grid import night_style
from nmoe_train.results.pages.svg import escape_text

TEMPLATES = Path(__file__).with_name("templates")
FIGURES = TEMPLATES / "figures.html"
"""A page of nothing but figures: title, figures."""
FILTERS = (
    formats.count,
    formats.decimals,
    formats.duration,
    formats.microseconds,
    formats.milliseconds,
    formats.percent,
    formats.percentage,
    formats.ratio,
    formats.seconds,
    formats.size,
    formats.times,
    counted,
)


def render(template: Path, **data: Any) -> str:
    """The page that `template` makes of `data`. It finds other templates in its own folder and in this package."""
    return _environment(template.parent).get_template(template.name).render(data)


@lru_cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape_text,  # unprintable characters become spaces, which autoescape alone would not do
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {filter_.__name__: filter_ for filter_ in FILTERS}
    environment.globals["night_style"] = night_style
    return environment
