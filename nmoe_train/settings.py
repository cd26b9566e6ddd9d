"""Settings as people write and read them: section.name=value, and a TOML file that says what each one means."""

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
from nmoe_train.config import SECTIONS, Config, tomllib
from nmoe_train.errors import ConfigError


def parsed(text: str) -> tuple[str, Any]:
    """A setting's place and value from `section.name=value`; a value is TOML, or else plain text."""
    place, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in place.split(".")):
        raise ConfigError(f"--set {text}: not of the form section.name=value, such as gate.rate=0.1")
    names = [field.name for field in fields(Config)]
    if "." not in place and place not in names:
        homes = [f"{name}.{place}" for name in SECTIONS if place in {f.name for f in fields(_section(name))}]
        hint = f"did you mean {' or '.join(homes)}?" if homes else f"there are {', '.join(names)}"
        raise ConfigError(f"--set {text}: no setting is called {place}; {hint}")
    if place in SECTIONS:
        raise ConfigError(f"--set {text}: {place} is a section; set one of its settings, as {place}.name=value")
    try:
        return place, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return place, value


def as_toml(config: Config) -> str:
    """Every setting, each with what it means, as a file that `configure` takes; what is null is commented out."""
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
    notes, hints = _notes(kind), get_type_hints(kind)
    lines = []
    for key, value in table.items():
        choices = [repr(choice) for choice in get_args(hints[key])] if get_origin(hints[key]) is Literal else []
        about = [notes.get(key, ""), f"One of {', '.join(choices)}." if choices else ""]
        lines += [f"# {line}" for line in about if line]
        lines.append(f"# {key} =" if value is None else f"{key} = {_inline(value)}")
    return lines


def _notes(kind: type) -> dict[str, str]:
    """What stands under each field of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    notes = {}
    for field, note in pairwise(getattr(body, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            notes[getattr(field.target, "id", "")] = " ".join(str(note.value.value).split())
    return notes


def _section(name: str) -> type:
    return type(getattr(Config(), name))


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
