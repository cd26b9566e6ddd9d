"""Converts plain data (what JSON and TOML contain) to frozen dataclasses and back.

The conversion is strict: unknown keys and missing required keys are errors, and a value must already have the type of
its field. Errors are ValueErrors that name the key; the caller adds the name of the file.
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

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def require(holds: bool, text: str) -> None:
    """Raise ValueError with this text unless `holds`."""
    if not holds:
        raise ValueError(text)


def from_plain(kind: type[T], value: object, where: str = "") -> T:
    """Convert the table `value` to the dataclass `kind`; keys of fields with a default are optional.

    where: the dotted path of `value` in the file, for error messages.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or kind.__name__} is {_name(value)}; expected a table of keys")
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
    """Parse JSON strictly.

    ValueError for anything but UTF-8, a key that occurs twice in an object, deep nesting, a number that is too long,
    NaN and infinities.
    """

    def table(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("not JSON: a key appears twice in one object")
        return made

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"not JSON: {text[:40]} is not a finite number")
        return float(text)

    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=table, parse_float=number, parse_constant=number)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except ValueError as error:  # not UTF-8, an integer of thousands of digits, or raised by table or number above
        raise ValueError(f"not JSON: {str(error).removeprefix('not JSON: ')}") from error


def to_plain(value: Any) -> Any:
    """Convert a dataclass, its mappings and its tuples to the dicts and lists that JSON and TOML can store."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'top_k'?)" for a mistyped word; empty if no known word is similar."""
    close = difflib.get_close_matches(str(word)[:80], list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _convert(hint: Any, value: object, where: str) -> Any:
    """Convert one value to the type that `hint`, the annotation of its field, asks for."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        if value is None:
            return None
        present = [argument for argument in arguments if argument is not type(None)]
        return _convert(present[0], value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{where} is {value!r:.80}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_name(value)}; expected a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {_name(value)}; expected a table of keys")
        return {str(key): _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: object, where: str) -> object:
    """Check a bool, int, float or str; a whole number is accepted where a float is expected."""
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{where} is too large a number") from None
    if type(value) is not hint:
        raise ValueError(f"{where} is {_name(value)}; expected {_NAMES[hint]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; expected a finite number")
    return value


def _name(value: object) -> str:
    """What the value is, for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a table"
    return _NAMES.get(type(value), type(value).__name__)


def _join(where: str, key: object) -> str:
    """The dotted path of `key` below `where`, printable and short."""
    name = str(key)
    if not name.isprintable() or len(name) > 80:
        name = repr(name[:80])  # a key from outside must neither break the line nor fill the screen
    return f"{where}.{name}" if where else name
