"""Peers that send wrong answers, callers without a key, and frames that are not messages."""

from __future__ import annotations

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
    answering,
    bright,
    mangled,
    nodes,
    sound_frames,
    states,
    wait_until,
)

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.client import Client
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device.node import Node
from nmoe_edge.errors import CallError, FleetError, KeyFileError, NetworkError
from nmoe_edge.keys import key_path, make_pair, read_key
from nmoe_edge.protocol.messages import Leave, Ping, Reason, Refuse
from nmoe_edge.protocol.wire import encode

pytestmark = pytest.mark.socket


def nan_answer(ask):
    header, payload = answering(ask)
    return header, b"\xff" * len(payload)


NONSENSE = {
    "other bytes": lambda _ask: [(b"\0" * 64, b"x" * 10)],
    "a foreign frame": lambda _ask: [(b"hello",)],
    "NaN": lambda ask: [nan_answer(ask)],
    "the wrong shape": lambda ask: [answering(ask, shape=(3, 9))],
    "another expert": lambda ask: [answering(ask, expert=0)],
    "other request numbers": lambda ask: [answering(ask, number=9)],
    "nothing": lambda _ask: [],
    "a refusal": lambda ask: [encode(Refuse(ask.request, Reason.FAILED, "no"))],
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_peer_with_unusable_answers_is_not_asked_again_and_every_row_is_answered(fleet, what):
    cellar = read_bundle(fleet / "cellar").manifest
    with (
        Impostor(address_of(fleet, "cellar"), cellar, NONSENSE[what]) as impostor,
        nodes(fleet, "attic", "barn") as (attic, _),
    ):
        wait_until(lambda: states(attic.status())["cellar"] == "alive")
        for _ in range(30):
            answers = attic.infer(bright(2, 1), 5.0)
            assert answers.rows[0].missing == (2,)
            assert answers.rows[1].experts == (1,)
            assert np.isfinite(answers.outputs).all()
        if what not in ("a refusal", "nothing", "other request numbers"):
            assert states(attic.status())["cellar"] == "wrong"
            assert impostor.asked <= 2
        if what in ("nothing", "other request numbers"):
            assert impostor.asked <= 6  # asked again only after a successful probe


def test_random_and_mutated_frames_do_not_stop_a_node(fleet, pytestconfig):
    count = 2 * pytestconfig.getoption("--fuzz-examples")
    rng = np.random.default_rng(0)
    with nodes(fleet, "attic", "barn") as (attic, _):
        sound = sound_frames(attic.models.manifest)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(attic.address)
            for _ in range(count):
                dealer.send_multipart(mangled(rng, sound[:3], least=1))
            wait_until(lambda: attic.status()["counts"].get("messages_malformed", 0) > count / 3)
        assert "bugs" not in attic.status()["counts"]
        wait_until(lambda: attic.status()["under_way"] == 0)
        wait_until(lambda: answered_by(attic, bright(1)) == (1,))


def test_a_caller_without_a_known_key_is_refused_and_counted(keyed):
    with nodes(keyed, "attic", "barn") as (attic, _):
        device = read_fleet(keyed / FLEET_FILE).named("attic")
        with Client(attic.address) as plain, pytest.raises(CallError, match=r"no answer within 0\.4 s"):
            plain.status(0.4)
        with (
            Client(attic.address, make_pair(), device.public_key) as unknown,
            pytest.raises(CallError, match="does it know this key"),
        ):
            unknown.status(0.4)
        known = read_key(key_path(keyed / FLEET_FILE, "cellar"))
        with Client(attic.address, known, device.public_key) as known_client:
            counts = known_client.status()["counts"]
        assert counts["keys_unknown"] >= 1
        assert counts["handshakes_failed"] >= 1


def test_a_device_cannot_say_goodbye_in_the_name_of_another(keyed):
    with nodes(keyed) as (attic, *_):
        cellar = read_key(key_path(keyed / FLEET_FILE, "cellar"))
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.curve_publickey, dealer.curve_secretkey = cellar.public.encode(), cellar.secret.encode()
            dealer.curve_serverkey = read_fleet(keyed / FLEET_FILE).named("attic").public_key.encode()
            dealer.connect(attic.address)
            dealer.send_multipart(encode(Leave("barn")))
            dealer.send_multipart(encode(Ping(1)))
            assert dealer.poll(3000)
        assert states(attic.status())["barn"] == "alive"


def test_without_keys_nothing_but_loopback_is_served(fleet):
    with pytest.raises(NetworkError, match="not loopback.*nmoe-edge keygen"):
        Node(fleet / "attic", fleet / FLEET_FILE, listen="tcp://0.0.0.0:7199", log=StderrLog("attic"))


def test_a_key_file_that_others_may_read_or_of_another_device_is_refused(keyed):
    path = key_path(keyed / FLEET_FILE, "attic")
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="others may read it"):
        Node(keyed / "attic", keyed / FLEET_FILE, log=StderrLog("attic"))
    with pytest.raises(FleetError, match="not that of its key file"):
        Node(keyed / "attic", keyed / FLEET_FILE, key=key_path(keyed / FLEET_FILE, "barn"), log=StderrLog("attic"))


def test_a_discovered_address_is_tried_only_while_the_peer_is_not_alive(fleet):
    with nodes(fleet, "attic", "barn") as (attic, barn):
        attic.peer_discovered("barn", "tcp://127.0.0.1:1")
        attic.peer_discovered("cellar", "tcp://192.0.2.1:7101")  # not loopback, and this fleet has no keys
        attic.peer_discovered("shed", "tcp://127.0.0.1:1")
        addresses = {peer["name"]: peer["address"] for peer in attic.status()["peers"]}
        assert addresses == {"barn": barn.address, "cellar": address_of(fleet, "cellar")}
        attic.peer_discovered("cellar", "tcp://127.0.0.1:1")
        wait_until(lambda: attic.status()["peers"][1]["address"] == "tcp://127.0.0.1:1")


def test_a_peer_cannot_answer_or_refuse_in_the_name_of_another(fleet):
    """Request numbers are easy to guess, but an answer counts only from the connection that was asked."""
    barn, slow = read_bundle(fleet / "barn").manifest, read_bundle(fleet / "cellar").manifest

    def liar(ask):
        lies = [answering(ask, number=near, expert=2) for near in (-1, 1)]
        refusals = [encode(Refuse(ask.request + near, Reason.FAILED)) for near in (-1, 1)]
        return [*lies, *refusals, answering(ask, expert=1)]

    def late(ask):
        time.sleep(0.1)
        return [answering(ask, expert=2)]

    with (
        Impostor(address_of(fleet, "barn"), barn, liar),
        Impostor(address_of(fleet, "cellar"), slow, late),
        nodes(fleet, "attic", rules=replace(NO_HEDGES, top_k=3)) as (attic,),
    ):
        wait_until(lambda: set(states(attic.status()).values()) == {"alive"})
        (row,) = attic.infer(bright(0), 3.0).rows
        assert 2 in row.experts  # cellar's own answer, although it was late
        assert states(attic.status()) == {"barn": "wrong", "cellar": "alive"}


def test_a_peer_that_says_goodbye_and_never_answers_is_not_waited_for_until_the_deadline(fleet):
    cellar = read_bundle(fleet / "cellar").manifest
    with (
        Impostor(address_of(fleet, "cellar"), cellar, lambda _ask: []) as impostor,
        nodes(fleet, "attic", "barn", rules=replace(NO_HEDGES, deadline_s=30.0)) as (attic, _),
    ):
        wait_until(lambda: states(attic.status())["cellar"] == "alive")
        found = []
        thread = threading.Thread(target=lambda: found.append(attic.infer(bright(2), 30.0)))
        thread.start()
        wait_until(lambda: impostor.asked)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.connect(attic.address)
            dealer.send_multipart(encode(Leave("cellar")))
            thread.join(5)
        assert not thread.is_alive()
        assert found[0].rows[0].missing == (2,)


def test_messages_with_a_key_removed_from_the_fleet_are_ignored(keyed):
    with nodes(keyed, "attic", "barn") as (attic, _):
        described = read_fleet(keyed / FLEET_FILE)
        known = read_key(key_path(keyed / FLEET_FILE, "cellar"))
        with Client(attic.address, known, described.named("attic").public_key) as known_client:
            assert known_client.status()
            write_fleet(keyed / FLEET_FILE, replace(described, device=described.device[:2]))
            attic.reload()
            wait_until(lambda: attic.status()["counts"].get("reloads") == 1)
            with pytest.raises(CallError, match="no answer"):
                known_client.status(0.4)
