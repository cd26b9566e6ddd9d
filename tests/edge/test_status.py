"""The types of the status report describe what a real device reports."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from edge.fleets import NO_HEDGES, bright, nodes

from nmoe_edge.client import Client
from nmoe_edge.status import StatusReport


def check(value, hint, where):
    """Fail unless a value from JSON has this type: a TypedDict with exactly its keys, a list, a Literal, …"""
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        assert value.keys() == hints.keys(), where
        for key, part in hints.items():
            check(value[key], part, f"{where}.{key}")
    elif get_origin(hint) is list:
        for item in value:
            check(item, get_args(hint)[0], f"{where}[]")
    elif get_origin(hint) is dict:
        for key, item in value.items():
            check(item, get_args(hint)[1], f"{where}.{key}")
    elif get_origin(hint) is Literal:
        assert value in get_args(hint), where
    elif get_origin(hint) is UnionType:
        (kind,) = set(get_args(hint)) - {NoneType}
        if value is not None:
            check(value, kind, where)
    else:
        assert type(value) is hint or (hint is float and type(value) is int), f"{where} is {value!r}"


@pytest.mark.socket
def test_a_report_of_a_serving_device_is_as_its_type_says(fleet):
    with nodes(fleet, "attic", "barn", rules=NO_HEDGES) as (attic, _), Client(attic.address) as client:
        client.infer(bright(0, 1, 2))
        for report in (client.status(), json.loads(json.dumps(attic.status()))):
            check(report, StatusReport, "status")
            assert report["took"].keys() == {"extraction", "request_remote"}
            assert report["counts"]["rows"] == 3
            assert report["rules"]["local_first"] == 1.0
            assert [peer["name"] for peer in report["peers"]] == ["barn", "cellar"]
