from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from edge.fleets import ALONE, bright, nodes, until

from nmoe_edge.device import requests
from nmoe_edge.device.requests import Rules
from nmoe_edge.errors import CallError, ModelError
from nmoe_edge.protocol.messages import Infer, Refuse
from nmoe_edge.protocol.tensor import Tensor


def test_a_request_that_is_done_leaves_nothing_behind_until_its_deadline(fleet):
    with nodes(fleet, "attic", rules=replace(ALONE, deadline_s=3600.0)) as (attic,):
        for _ in range(500):
            attic.infer(bright(0), 3600.0)
        assert len(attic._origin._alarms) < 200


def test_inputs_of_which_more_is_made_than_a_message_holds_are_refused(fleet, monkeypatch):
    monkeypatch.setattr(requests, "_MOST_BYTES", 10 * 4 * 4)
    with nodes(fleet, "attic") as (attic,):
        assert len(attic.infer(bright(*[0] * 10)).rows) == 10
        with pytest.raises(CallError, match="what is made of 11 rows is over 160 bytes; ask with fewer"):
            attic.infer(bright(*[0] * 11))


@pytest.mark.parametrize("local_first", [float("nan"), -0.1, 1.1])
def test_sureness_is_a_number_from_zero_to_one(local_first):
    with pytest.raises(ModelError, match="local-first is .*, not a number from 0 to 1"):
        Rules(local_first=local_first)


def test_a_request_that_was_closed_by_force_is_replied_to_once(fleet):
    with nodes(fleet, "attic") as (attic,):
        begun, may_go, replies = threading.Event(), threading.Event(), []
        extractor = attic.models.extractor

        def held(rows):
            begun.set()
            assert may_go.wait(20)
            raise ModelError(f"no answer for {len(rows)} rows")

        attic.models.extractor = held
        message = Infer(7, 0, 60_000, Tensor.pack(bright(0), "uint8"))
        attic._do(lambda now: attic._origin.begin(message, replies.append, now))
        assert begun.wait(20)
        attic._do(lambda now: attic._origin.sweep(now + 3600))
        until(lambda: replies)
        may_go.set()
        attic.models.extractor = extractor
        assert attic.infer(bright(0)).rows[0].experts == (0,)  # what was held is done by then
        assert [type(reply) for reply in replies] == [Refuse]
