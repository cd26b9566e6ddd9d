from __future__ import annotations

import os
import signal
import time
import warnings

import numpy as np
import pytest
from edge.fleets import NO_HEDGES, address_of, bright, nodes, wait_until

from nmoe_edge.bundle.fleet import FLEET_FILE
from nmoe_edge.client import Client
from nmoe_edge.common.log import StderrLog
from nmoe_edge.device.node import Node
from nmoe_edge.errors import CallError
from nmoe_edge.protocol.wire import DEFAULT_CAPS

pytestmark = pytest.mark.socket


def test_a_client_of_a_dead_port_never_hangs_and_queues_nothing(fleet):
    address = address_of(fleet, "attic")
    with Client(address) as client:
        for _ in range(5):
            with pytest.raises(CallError, match="no answer"):
                client.infer(bright(0), 0.01)
        with Node(fleet / "attic", fleet / FLEET_FILE, rules=NO_HEDGES, log=StderrLog("attic")) as attic:
            wait_until(lambda: client.infer(bright(0)).rows)
            assert attic.status()["counts"]["rows"] == 1
    with pytest.raises(CallError, match="the client is closed"):
        client.status()


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan"), float("inf"), 3601.0])
def test_a_deadline_out_of_range_is_refused(fleet, deadline_s):
    with nodes(fleet, "attic") as (attic,), Client(attic.address) as client:
        for device in (client, attic):
            with pytest.raises(CallError, match=r"must be over 0 and at most 3600"):
                device.infer(bright(0), deadline_s)


def test_more_rows_than_a_message_holds_are_refused(fleet):
    with Client(address_of(fleet, "attic")) as client, pytest.raises(CallError, match="4097 rows are over 4096"):
        client.infer(np.zeros((DEFAULT_CAPS.rows + 1, 1, 6, 6), np.uint8))


def test_a_forked_process_opens_its_own_connections(fleet):
    with nodes(fleet, "attic") as (attic,), Client(attic.address) as client:
        assert client.infer(bright(0)).rows[0].experts == (0,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forking with threads, which is what this test does
            child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if client.infer(bright(0), 5.0).rows[0].experts == (0,) else 2
            finally:
                os._exit(status)
        try:
            end = time.monotonic() + 20
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                assert time.monotonic() < end, "the child hangs"
                time.sleep(0.01)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        assert ended == (child, 0)
        assert client.infer(bright(0)).rows[0].experts == (0,)
