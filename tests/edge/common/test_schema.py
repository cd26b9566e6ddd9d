from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from nmoe_edge.common.schema import from_plain, parse_json, to_plain


@dataclass(frozen=True, slots=True)
class Inner:
    size: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size is negative")


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, Inner] | None = None
    on: bool = False
    anything: Any = None


PLAIN = {
    "name": "x",
    "kind": "b",
    "inner": {"size": 3, "ratio": 1},
    "many": [{"size": 1, "ratio": 0.25}],
    "by_name": {"first": {"size": 2, "ratio": 2.5}},
    "on": True,
    "anything": {"free": [1, None]},
}


def test_plain_data_is_converted_to_a_dataclass_and_back():
    outer = from_plain(Outer, PLAIN)
    assert outer.inner == Inner(3, 1.0)
    assert to_plain(outer) == PLAIN


def test_a_key_with_a_default_is_optional():
    assert from_plain(Outer, {"name": "x", "kind": "a", "inner": {"size": 1}}) == Outer("x", "a", Inner(1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nmae": "x"}, "unknown key 'nmae' (did you mean 'name'?)"),
        ({"inner": {"sise": 1}}, "unknown key 'inner.sise' (did you mean 'size'?)"),
        ({"inner": {}}, "the key 'inner.size' is missing"),
        ({"inner": {"size": -1}}, "inner: size is negative"),
        ({"inner": 3}, "inner is a whole number; expected a table of keys"),
        ({"inner": {"size": True}}, "inner.size is true or false; expected a whole number"),
        ({"inner": {"size": 1.0}}, "inner.size is a number; expected a whole number"),
        ({"inner": {"size": "1"}}, "inner.size is text; expected a whole number"),
        ({"inner": {"size": 1, "ratio": float("nan")}}, "inner.ratio is nan; expected a finite number"),
        ({"inner": {"size": 1, "ratio": 10**400}}, "inner.ratio is too large a number"),
        ({"a\nb": 1}, "unknown key ''a\\nb''"),
        ({"name": None}, "name is nothing; expected text"),
        ({"on": 1}, "on is a whole number; expected true or false"),
        ({"kind": "c"}, "kind is 'c'; expected one of 'a', 'b'"),
        ({"kind": []}, "kind is []; expected one of 'a', 'b'"),
        ({"many": {"size": 1}}, "many is a table; expected a list"),
        ({"many": [{"size": 1}, 2]}, "many[1] is a whole number; expected a table of keys"),
        ({"by_name": []}, "by_name is a list; expected a table of keys"),
    ],
)
def test_an_error_names_the_key_and_what_was_expected(change, text):
    with pytest.raises(ValueError, match=".") as refused:
        from_plain(Outer, {**PLAIN, **change})
    assert str(refused.value) == text


def test_a_list_instead_of_a_table_is_refused():
    with pytest.raises(ValueError, match="Outer is a list"):
        from_plain(Outer, [])


@pytest.mark.parametrize(
    "text",
    ["", "{", b"\xff", b"\xef\xbb\xbf{}", "[" * 100_000, '{"a": 1, "a": 2}', "NaN", "-Infinity", "1e999", "1" * 5000],
)
def test_invalid_json_is_refused(text):
    with pytest.raises(ValueError, match="."):
        parse_json(text)


def test_valid_json_is_parsed():
    assert parse_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "é"]}
