"""Plain data (what JSON and TOML hold) -> frozen dataclasses, and back.

Strict in both senses: every key is known and every required one is there, and a value has its field's type, not one
that could be made into it. What is wrong is said as a ValueError that names the place; whoever knows which file it was
translates it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_plain(kind: type[T], value: object, where: str = "") -> T:
    """`value` as a dataclass of `kind`; a field with a default may be absent."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or kind.__name__} is {_name(value)} where a table of keys was due")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise ValueError(f"unknown key '{_join(where, key)}'{nearest(key, fields)}")
    given = {}
    for name, field in fields.items():
        if name in value:
            given[name] = _convert(hints[name], value[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the key {_join(where, name)!r} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def parse_json(data: bytes | str) -> object:
    """JSON, or ValueError: not UTF-8, a key twice, too deep, too long a number, NaN and infinities are no JSON here."""

    def table(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("not JSON: a key stands twice in one object")
        return made

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"not JSON: {text[:40]} is no finite number")
        return float(text)

    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=table, parse_float=number, parse_constant=number)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except ValueError as error:  # bytes that are no text, a number of thousands of digits, or one of ours from above
        raise ValueError(f"not JSON: {str(error).removeprefix('not JSON: ')}") from error


def to_plain(value: Any) -> Any:
    """A dataclass, its mappings and its tuples as what JSON and TOML hold."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint for somebody who mistyped one of the known words, or nothing."""
    close = difflib.get_close_matches(str(word)[:80], list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _convert(hint: Any, value: object, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        present = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _convert(present[0], value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{where} is {value!r:.80}, none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_name(value)} where a list was due")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {_name(value)} where a table of keys was due")
        return {str(key): _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: object, where: str) -> object:
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{where} is too large a number") from None
    if type(value) is not hint:
        raise ValueError(f"{where} is {_name(value)} where {_NAMES[hint]} was due")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: numbers are finite")
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def _name(value: object) -> str:
    if value is None:
        return "nothing"
    return "a table" if isinstance(value, Mapping) else _NAMES.get(type(value), type(value).__name__)


def _join(where: str, key: object) -> str:
    name = str(key)
    if not name.isprintable() or len(name) > 80:
        name = repr(name[:80])  # somebody else's key must neither break a line nor fill a screen
    return f"{where}.{name}" if where else name
