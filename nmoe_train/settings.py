"""Settings as text: `section.name=value` on a command line, and a TOML file with a comment for every setting.

config.py defines the settings; the comments are the docstrings of its fields.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nmoe_edge.common.schema import to_plain
from nmoe_train.config import Config
from nmoe_train.errors import ConfigError
from nmoe_train.recipes import SECTIONS, tomllib

_WIDTH = 110
"""Longest line of a comment"""


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `section.name=value` into name and value. A value that is not TOML is plain text."""
    name, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"--set {text}: expected section.name=value, for example gate.rate=0.1")
    if name in SECTIONS:
        raise ConfigError(f"--set {text}: {name} is a section; set one of its settings as {name}.name=value")
    known = [field.name for field in fields(Config)]
    if "." not in name and name not in known:
        raise ConfigError(f"--set {text}: unknown setting {name!r}; {_hint(name)}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return name, value


def _hint(name: str) -> str:
    """For a setting without its section: the sections that have one of this name."""
    full_names = [f"{section}.{name}" for section in SECTIONS if name in _section_settings(section)]
    if full_names:
        return f"did you mean {' or '.join(full_names)}?"
    return f"expected one of {', '.join(field.name for field in fields(Config))}"


def _section_settings(section: str) -> set[str]:
    return {field.name for field in fields(type(getattr(Config(), section)))}


def as_toml(config: Config) -> str:
    """Every setting with its meaning, as a TOML file for `configure`. A setting that is not set is commented out."""
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in SECTIONS:
            lines += ["", f"[{field.name}]", f"# {(type(value).__doc__ or '').splitlines()[0]}"]
            lines += _lines(type(value), to_plain(value))
        else:
            lines += _lines(Config, {field.name: to_plain(value)})
    return "\n".join(lines) + "\n"


def _lines(kind: type, table: Mapping[str, Any]) -> list[str]:
    """The lines of some settings of the dataclass `kind`: comments and `name = value`."""
    docstrings = _field_docstrings(kind)
    hints = get_type_hints(kind)
    lines = []
    for key, value in table.items():
        lines += [f"# {line}" for line in textwrap.wrap(docstrings.get(key, ""), _WIDTH, break_on_hyphens=False)]
        if get_origin(hints[key]) is Literal:
            lines.append(f"# One of {', '.join(json.dumps(choice) for choice in get_args(hints[key]))}.")
        lines.append(f"# {key} =" if value is None else f"{key} = {_inline(value)}")
    return lines


def _field_docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    docstrings = {}
    for field, note in pairwise(getattr(body, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            docstrings[getattr(field.target, "id", "")] = " ".join(str(note.value.value).split())
    return docstrings


def _inline(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, Mapping):
        items = [f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
