"""Devices on real sockets, in this process: their answers, with and without peers."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import zmq
from edge.fleets import (
    NO_HEDGES,
    Impostor,
    address_of,
    answered_by,
    bright,
    copied_fleet,
    nodes,
    pin_bundle,
    states,
    wait_until,
)

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.bundle.manifest import trunk_digest
from nmoe_edge.client import Client
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device.node import Node
from nmoe_edge.device.rules import Rules
from nmoe_edge.errors import CallError, FleetError, ModelError, NetworkError
from nmoe_edge.models import Models
from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.messages import Answer, Ask, Ping, Pong, Reason, Refuse
from nmoe_edge.protocol.routing import route
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import decode, encode

pytestmark = pytest.mark.socket


def in_one_process(folder, images, own, top_k):
    """The outputs of the same bundles without sockets."""
    opened = [Models(read_bundle(folder / name)) for name in ("attic", "barn", "cellar")]
    models = {one.manifest.expert: one for one in opened}
    latents = models[own].extractor(images)
    routed = route(models[own].gate(latents), own, models, top_k)
    exchange = Exchange(routed, 3, itertools.count(), deadline=1.0)
    for call in exchange.start(0.0):
        exchange.answered(call.request, call.expert, models[call.expert].expert(latents[list(call.rows)]), 0.5)
    return exchange.result()[0]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("keys", [False, True])
def test_a_fleet_answers_row_for_row_as_its_bundles_do_in_one_process(tiny_fleet, tmp_path, top_k, keys):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet", keyed=keys)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 6, 6)).astype(np.uint8)
    with nodes(folder, rules=replace(NO_HEDGES, top_k=top_k)) as (attic, *_):
        answers = attic.infer(images)
        assert np.allclose(answers.outputs, in_one_process(folder, images, 0, top_k), atol=1e-5)
        assert not any(row.degraded for row in answers.rows)
        assert {expert for row in answers.rows for expert in row.experts} == {0, 1, 2}
        assert attic.status()["counts"]["asks"] == 2  # one per remote expert, not per row


def test_a_client_used_by_many_threads_gets_the_same_answers_as_the_node(fleet):
    with nodes(fleet) as (attic, *_), Client(attic.address) as client:
        expected = attic.infer(bright(0, 1, 2)).outputs
        found = []

        def ask():
            found.extend(client.infer(bright(0, 1, 2)).outputs for _ in range(20))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 80
        assert all(np.array_equal(outputs, expected) for outputs in found)


def test_without_a_fleet_a_device_answers_alone(fleet):
    with Node(fleet / "attic", log=StderrLog("attic")) as attic:
        assert attic.address == ""
        answers = attic.infer(bright(0, 1))
        assert [row.experts for row in answers.rows] == [(0,), (0,)]
        assert [row.missing for row in answers.rows] == [(), (1,)]


def test_when_an_expert_is_gone_its_row_goes_to_the_next_by_rank_and_names_the_missing_one(fleet):
    with nodes(fleet, "attic", "barn") as (attic, _):
        (row,) = attic.infer(bright(2)).rows
        assert row.missing == (2,)
        assert row.experts in {(0,), (1,)}


def test_when_all_peers_leave_every_row_is_answered_locally_and_marked_as_degraded(fleet):
    with nodes(fleet) as (attic, barn, cellar):
        barn.close()
        cellar.close()
        wait_until(lambda: set(states(attic.status()).values()) == {"left"})
        answers = attic.infer(bright(0, 1, 2))
        assert [row.experts for row in answers.rows] == [(0,)] * 3
        assert [row.degraded for row in answers.rows] == [False, True, True]


def test_a_peer_that_returns_is_used_again(fleet):
    with nodes(fleet) as (attic, barn, _):
        barn.close()
        assert attic.infer(bright(1)).rows[0].degraded
        with Node(fleet / "barn", fleet / FLEET_FILE, rules=NO_HEDGES, log=StderrLog("barn")):
            wait_until(lambda: states(attic.status())["barn"] == "alive")
            assert attic.infer(bright(1)).rows[0].experts == (1,)
            assert len(attic.status()["peers"]) == 2


def other_trunk(folder, name):
    """Change the device's bundle as if its extractor had been trained again."""
    bundle = read_bundle(folder / name)
    manifest, source = bundle.manifest, "ab" * 32
    trunk = trunk_digest(source, manifest.latent.dim, manifest.experts, manifest.outputs)
    changed = replace(manifest, extractor_source=source, trunk=trunk)
    pin_bundle(folder, write_bundle(folder / name, changed, bundle.contents))


def test_devices_with_different_trunks_never_exchange_rows(fleet):
    other_trunk(fleet, "cellar")
    with nodes(fleet, "attic", "barn") as (attic, barn):
        cellar = Node(fleet / "cellar", fleet / FLEET_FILE, rules=NO_HEDGES, log=StderrLog("cellar"))
        try:
            wait_until(lambda: states(attic.status())["cellar"] == "foreign")
            for _ in range(20):
                assert attic.infer(bright(2)).rows[0].missing == (2,)
                assert cellar.infer(bright(0, 1)).rows[0].experts == (2,)
            for node in (attic, barn, cellar):
                assert "rows_for_peers" not in node.status()["counts"] or node is barn
            # An Ask without a Hello before it is refused too.
            ask = Ask(
                5,
                0,
                1000,
                2,
                read_bundle(fleet / "attic").manifest.trunk_bytes,
                Tensor.pack(np.ones((1, 4), "f4"), "float32"),
            )
            assert raw_call(cellar.address, ask) == Refuse(
                5, Reason.WRONG_TRUNK, "these latents come from another extractor"
            )
        finally:
            cellar.close()


def raw_call(address, message, wait_ms=3000):
    """Send a message without a client and return the first reply."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(address)
        dealer.send_multipart(encode(message))
        assert dealer.poll(wait_ms), "no reply"
        return decode(dealer.recv_multipart())


def test_inputs_that_do_not_fit_are_refused_with_a_reason(fleet):
    with nodes(fleet, "attic") as (attic,), Client(attic.address) as client:
        with pytest.raises(CallError, match=r"inputs are uint8 \[1, 5, 5\], not uint8 \[1, 6, 6\]"):
            client.infer(np.zeros((1, 1, 5, 5), np.uint8))
        with pytest.raises(CallError, match="inputs are float32"):
            attic.infer(np.zeros((1, 1, 6, 6), np.float32))
        assert attic.infer(bright(0)).rows[0].experts == (0,)


def test_an_ask_with_a_spent_budget_is_never_run_and_pings_are_answered(fleet):
    with nodes(fleet, "attic") as (attic,):
        trunk = attic.models.manifest.trunk_bytes
        reply = raw_call(attic.address, Ask(5, 0, 0, 0, trunk, Tensor.pack(np.ones((1, 4), "f4"), "float32")))
        assert reply == Refuse(5, Reason.EXPIRED)
        assert raw_call(attic.address, Ping(9)) == Pong(9)
        assert "rows_for_peers" not in attic.status()["counts"]


class Late:
    """A graph that waits before each run."""

    def __init__(self, graph, wait):
        self.graph = graph
        self.wait = wait
        self.provider = graph.provider

    def __call__(self, rows):
        self.wait()
        return self.graph(rows)


def test_requests_that_miss_their_deadline_are_refused_and_later_ones_are_answered(fleet):
    with nodes(fleet, "attic") as (attic,), Client(attic.address) as client:
        busy = threading.Event()
        attic.models.extractor = Late(attic.models.extractor, lambda: busy.wait(5))
        found = []

        def ask(deadline_s):
            try:
                client.infer(bright(0), deadline_s)
            except CallError as error:
                found.append(str(error))

        threads = [threading.Thread(target=ask, args=(0.3,)) for _ in range(8)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 5
        assert len(found) == 8
        assert all("the deadline passed" in line for line in found)
        busy.set()
        wait_until(lambda: attic.status()["under_way"] == 0)
        # The device has learned that a row takes long, and still runs a request that waits for no other.
        wait_until(lambda: answered_by(client, bright(0)) == (0,))


def test_a_node_has_failed_only_after_it_ended_because_of_a_bug(fleet, monkeypatch):
    with nodes(fleet, "attic") as (attic,):
        attic.infer(bright(0))
        assert not attic.failed
    assert not attic.failed
    monkeypatch.setattr("nmoe_edge.device.node._MAX_BUGS", 0)
    with nodes(fleet, "attic") as (attic,):

        def broken(_now):
            raise RuntimeError("a bug")

        attic._do(broken)
        assert attic.ended.wait(20)
        assert attic.failed


def test_an_address_in_use_is_an_error(fleet):
    with nodes(fleet, "attic") as (attic,), pytest.raises(NetworkError, match=r"7|in use"):
        Node(fleet / "barn", fleet / FLEET_FILE, listen=attic.address, log=StderrLog("barn"))


def test_another_bundle_than_fleet_toml_lists_is_refused(fleet):
    bundle = read_bundle(fleet / "attic")
    write_bundle(fleet / "attic", replace(bundle.manifest, target="pi"), bundle.contents)
    with pytest.raises(FleetError, match="names another bundle for attic"):
        Node(fleet / "attic", fleet / FLEET_FILE, log=StderrLog("attic"))


def worse(folder, name):
    """Replace a bundle with one that is valid, but fails its self-test."""
    bundle = read_bundle(folder / name)
    other = replace(bundle.selftest, outputs=bundle.selftest.outputs + np.float32(9))
    pin_bundle(folder, write_bundle(folder / name, bundle.manifest, {**bundle.contents, "selftest.npz": other.write()}))


def test_a_bundle_that_fails_its_selftest_is_served_only_by_force_and_logged(fleet, capsys):
    worse(fleet, "attic")
    with pytest.raises(ModelError, match="FAILED its self-test on this machine"):
        Node(fleet / "attic", fleet / FLEET_FILE, log=StderrLog("attic"))
    with Node(fleet / "attic", fleet / FLEET_FILE, force=True, log=StderrLog("attic")) as attic:
        assert attic.infer(bright(0)).rows[0].experts == (0,)
    logged = capsys.readouterr().err
    assert "attic selftest_failed: " in logged
    assert "serving it anyway because of --force" in logged


def test_a_reload_serves_a_good_bundle_and_refuses_a_bad_one_without_failing_requests(fleet):
    with nodes(fleet) as (attic, *_):
        failed, over = [], threading.Event()

        def load():
            while not over.is_set():
                try:
                    if not all(row.experts for row in attic.infer(bright(0, 1, 2)).rows):
                        failed.append("unanswered")
                except CallError as error:
                    failed.append(str(error))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for target in ("pi", "x86") * 5:
                bundle = read_bundle(fleet / "attic")
                changed = write_bundle(fleet / "attic", replace(bundle.manifest, target=target), bundle.contents)
                pin_bundle(fleet, changed)
                attic.reload()
                wait_until(lambda changed=changed: attic.status()["bundle"] == changed.manifest.digest)
            worse(fleet, "attic")
            attic.reload()
            wait_until(lambda: attic.status()["counts"].get("reloads_refused") == 1)
        finally:
            over.set()
            thread.join()
        assert not failed
        # The device also finds new bundles by itself, so it may reload the same one twice.
        assert attic.status()["counts"]["reloads"] >= 10
        assert attic.models.manifest.target == "x86"


def test_a_leaving_device_finishes_open_requests(fleet):
    with nodes(fleet) as (attic, *_):
        attic.models.extractor = Late(attic.models.extractor, lambda: time.sleep(0.3))
        found = []
        thread = threading.Thread(target=lambda: found.append(attic.infer(bright(1), 3.0)))
        thread.start()
        wait_until(lambda: attic.status()["under_way"] == 1)
        attic.leave()
        thread.join()
        assert found[0].rows[0].experts == (1,)
        assert attic.ended.wait(5)


def test_rows_with_a_confident_own_expert_are_answered_locally(fleet):
    with nodes(fleet, rules=replace(NO_HEDGES, local_first=0.0)) as (attic, *_):
        answers = attic.infer(bright(0, 1, 2))
        assert [row.experts for row in answers.rows] == [(0,)] * 3
        assert not any(row.degraded for row in answers.rows)
        assert attic.status()["counts"] == {"rows": 3, "rows_local": 3}


def test_prefer_near_lowers_the_score_of_a_far_peer_and_zero_changes_nothing(fleet):
    with nodes(fleet, rules=replace(NO_HEDGES, prefer_near=1e6)) as (attic, *_):
        assert attic.infer(bright(1)).rows[0].experts == (1,)  # its answering time is not known yet
        assert attic.infer(bright(1)).rows[0].experts == (0,)
    with nodes(fleet, rules=NO_HEDGES) as (attic, *_):
        assert all(attic.infer(bright(1)).rows[0].experts == (1,) for _ in range(3))


def test_a_late_expert_is_hedged_within_the_budget_of_hedges(fleet):
    cellar, slow = read_bundle(fleet / "cellar").manifest, threading.Event()

    def answer(ask):
        if slow.is_set():
            time.sleep(0.05)
        outputs = np.tile(np.float32([0, 0, 9]), (ask.latents.rows, 1))
        return [encode(Answer(ask.request, ask.expert, 1, Tensor.pack(outputs, "float32")))]

    with (
        Impostor(address_of(fleet, "cellar"), cellar, answer),
        nodes(fleet, "attic", "barn", rules=Rules(hedge=True)) as (attic, _),
    ):
        wait_until(lambda: states(attic.status())["cellar"] == "alive")
        for _ in range(40):
            assert attic.infer(bright(2)).rows[0].experts
        slow.set()
        for _ in range(20):
            assert attic.infer(bright(2)).rows[0].experts
        counts = attic.status()["counts"]
        assert 1 <= counts["hedges"] <= 5 + 0.05 * counts["asks"]


def adapting(folder):
    """Change the fleet to adapt, with answers that carry no prior."""
    for name in ("attic", "barn", "cellar"):
        bundle = read_bundle(folder / name)
        routing = replace(bundle.manifest.routing, adapt=True)
        changed = replace(bundle.manifest, routing=routing, answers_carry_prior=False)
        pin_bundle(folder, write_bundle(folder / name, changed, bundle.contents))
    return folder


def test_a_device_learns_its_class_mix_uses_it_after_enough_rows_and_saves_it(fleet, tmp_path):
    adapting(fleet)
    unsure = bright(0)
    unsure[0, 0, 2:4] = 195
    with nodes(fleet, "attic", state=tmp_path / "state") as (attic,):
        before = attic.infer(unsure).outputs[0]
        assert before.sum() == pytest.approx(1, abs=1e-5)
        for _ in range(4):
            attic.infer(bright(*[0] * 60))
        mix = attic.status()["class_mix"]
        assert mix["mix"][0] > 0.6
        assert attic.infer(unsure).outputs[0, 0] > before[0]
    with nodes(fleet, "attic", state=tmp_path / "state") as (attic,):
        assert attic.status()["class_mix"]["rows"] == mix["rows"] + 1
    with nodes(fleet, "attic", state=tmp_path / "state", rules=replace(NO_HEDGES, adapt=False)) as (attic,):
        assert attic.status()["class_mix"]["adapt"] is False


def test_adapting_with_answers_that_carry_a_prior_is_refused(tiny_fleet, tmp_path):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet")
    bundle = read_bundle(folder / "attic")
    pin_bundle(
        folder, write_bundle(folder / "attic", replace(bundle.manifest, answers_carry_prior=True), bundle.contents)
    )
    with pytest.raises(ModelError, match="carry no prior, and these do"):
        Node(folder / "attic", folder / FLEET_FILE, rules=Rules(adapt=True), log=StderrLog("attic"))


def test_a_reload_may_remove_peers_that_open_requests_wait_for(fleet):
    cellar, barn = read_bundle(fleet / "cellar").manifest, read_bundle(fleet / "barn").manifest
    with (
        Impostor(address_of(fleet, "cellar"), cellar, lambda _ask: []) as impostor,
        Impostor(address_of(fleet, "barn"), barn, lambda _ask: []),
        nodes(fleet, "attic", rules=Rules(hedge=True, deadline_s=30.0)) as (attic,),
    ):
        wait_until(lambda: set(states(attic.status()).values()) == {"alive"})
        found = []
        thread = threading.Thread(target=lambda: found.append(attic.infer(bright(2), 30.0)))
        thread.start()
        wait_until(lambda: impostor.asked)
        alone = read_fleet(fleet / FLEET_FILE)
        write_fleet(fleet / FLEET_FILE, replace(alone, device=alone.device[:1]))
        attic.reload()
        thread.join(5)
        assert not thread.is_alive()
        assert found[0].rows[0].experts == (0,)
        assert "bugs" not in attic.status()["counts"]


def test_prefer_near_changes_the_ranking_and_no_weights(fleet):
    with nodes(fleet, rules=replace(NO_HEDGES, top_k=3, prefer_near=0.01)) as (attic, *_):
        attic.infer(bright(1))
        weights = attic.infer(bright(1)).rows[0].weights
    with nodes(fleet, rules=replace(NO_HEDGES, top_k=3)) as (attic, *_):
        assert attic.infer(bright(1)).rows[0].weights == weights
