from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from edge.fleets import NO_HEDGES, bright, nodes, pin_bundle, wait_until

from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.bundle.statistics import write_statistics
from nmoe_edge.device import requests
from nmoe_edge.errors import CallError, ModelError
from nmoe_edge.protocol.familiar import Familiar
from nmoe_edge.protocol.messages import Infer, Refuse
from nmoe_edge.protocol.tensor import Tensor


def test_an_answered_request_leaves_nothing_behind_until_its_deadline(fleet):
    with nodes(fleet, "attic", rules=replace(NO_HEDGES, deadline_s=3600.0)) as (attic,):
        for _ in range(500):
            attic.infer(bright(0), 3600.0)
        assert len(attic._requests._alarms) < 200


def test_inputs_with_larger_latents_than_a_message_holds_are_refused(fleet, monkeypatch):
    monkeypatch.setattr(requests, "_MAX_BYTES", 10 * 4 * 4)
    with nodes(fleet, "attic") as (attic,):
        assert len(attic.infer(bright(*[0] * 10)).rows) == 10
        with pytest.raises(CallError, match="latents or outputs of 11 rows are over 160 bytes; ask with fewer rows"):
            attic.infer(bright(*[0] * 11))


def test_a_confident_row_is_answered_locally_only_if_its_latent_is_familiar(fleet):
    """The own expert is always confident enough here. Its statistics know images that are bright at the top."""
    bundle = read_bundle(fleet / "attic")
    known = bundle.selftest.latents[:1]  # the image that is bright at the top
    familiar = Familiar(np.eye(4, dtype=np.float32), np.array(known))
    routing = replace(bundle.manifest.routing, local_first=0.0, familiar=0.5)
    contents = {**bundle.contents, "familiar.npz": write_statistics(familiar)}
    pin_bundle(fleet, write_bundle(fleet / "attic", replace(bundle.manifest, routing=routing), contents))
    with nodes(fleet, rules=NO_HEDGES) as (attic, *_):
        answers = attic.infer(bright(0, 1, 2))
        assert [row.experts for row in answers.rows] == [(0,), (1,), (2,)]
        assert attic.status()["rules"]["familiar"] == 0.5
        assert attic.status()["counts"]["rows_local"] == 1
    with nodes(fleet, "attic", rules=replace(NO_HEDGES, local_first=1.0)) as (attic,):
        assert attic.infer(bright(0)).rows[0].experts == (0,)


def test_an_ask_counts_only_when_it_was_sent(fleet, monkeypatch):
    with nodes(fleet, "attic", "barn") as (attic, _):
        monkeypatch.setattr(attic._sockets, "send", lambda *_: False)
        assert attic.infer(bright(1)).rows[0].experts == (0,)
        counts = attic.status()["counts"]
        assert "asks" not in counts
        assert counts["calls_refused"] == 1


def test_a_request_that_was_closed_by_force_is_replied_to_once(fleet):
    with nodes(fleet, "attic") as (attic,):
        begun = threading.Event()
        may_go = threading.Event()
        replies = []
        extractor = attic.models.extractor

        def held(rows):
            begun.set()
            assert may_go.wait(20)
            raise ModelError(f"no answer for {len(rows)} rows")

        attic.models.extractor = held
        message = Infer(7, 0, 60_000, Tensor.pack(bright(0), "uint8"))
        attic._do(lambda now: attic._requests.begin(message, replies.append, now))
        assert begun.wait(20)
        attic._do(lambda now: attic._requests.sweep(now + 3600))
        wait_until(lambda: replies)
        may_go.set()
        attic.models.extractor = extractor
        assert attic.infer(bright(0)).rows[0].experts == (0,)  # the held job is finished by then
        assert [type(reply) for reply in replies] == [Refuse]
