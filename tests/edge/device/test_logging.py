"""Where a real device logs: an application's Node to Python's logging, `nmoe-edge serve` to stderr."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from edge.fleets import NO_HEDGES, Processes, states, wait_until

from nmoe_edge.bundle.fleet import FLEET_FILE
from nmoe_edge.device.node import Node

pytestmark = pytest.mark.socket
ROOT = Path(__file__).parents[3]

APPLICATION = """
import sys, time
from nmoe_edge.device.files import ServedFiles
from nmoe_edge.device.node import Node
from nmoe_edge.errors import BundleError

def refuse(*_):
    raise BundleError("a test refuses it")

ServedFiles.read_again = refuse
{setup}
with Node(sys.argv[1], sys.argv[2]) as node:
    node.reload()
    while "reloads_refused" not in node.status()["counts"]:
        time.sleep(0.01)
"""


def test_an_embedded_node_logs_device_event_and_peer_to_pythons_logging(fleet, caplog, capsys):
    caplog.set_level(logging.INFO, "nmoe")
    with (
        Node(fleet / "attic", fleet / FLEET_FILE, rules=NO_HEDGES) as attic,
        Node(fleet / "barn", fleet / FLEET_FILE, rules=NO_HEDGES),
    ):
        wait_until(lambda: states(attic.status())["barn"] == "alive")
    records = [record for record in caplog.records if record.name == "nmoe"]
    (alive,) = [record for record in records if (record.device, record.event) == ("attic", "peer_alive")]
    assert (alive.levelname, alive.peer, alive.getMessage()) == ("INFO", "barn", "attic peer_alive: barn")
    assert {record.event for record in records} >= {"peer_alive", "leaving"}
    assert capsys.readouterr() == ("", "")


def run_application(fleet, setup):
    """Run an application with a node that refuses a reload, which is a warning. Returns stdout and stderr."""
    command = [sys.executable, "-c", APPLICATION.format(setup=setup), fleet / "attic", fleet / FLEET_FILE]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    return process.stdout, process.stderr


def test_an_application_without_logging_gets_nothing_on_stderr(fleet):
    assert run_application(fleet, setup="") == ("", "")


def test_an_application_with_logging_gets_our_records(fleet):
    out, err = run_application(fleet, setup="import logging; logging.basicConfig(level='INFO')")
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "WARNING:nmoe:attic reload_refused: keeps the old bundle: a test refuses it"
    assert lines[1] == "INFO:nmoe:attic leaving: 0 requests to finish"


def test_serve_logs_a_line_per_event_to_stderr(fleet):
    with Processes(fleet, "attic", "barn") as running:
        running.wait_for_peers("attic")
    lines = (running.logs / "attic").read_text().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d attic \w+: ", line) for line in lines)
    assert [line.partition(" ")[2] for line in lines if "peer_alive" in line] == ["attic peer_alive: barn"]


def test_serve_logs_json_with_the_peer_in_a_field(fleet):
    with Processes(fleet, "attic", "barn", options=("--log-json",)) as running:
        running.wait_for_peers("attic")
    events = [json.loads(line) for line in (running.logs / "attic").read_text().splitlines()]
    (alive,) = [event for event in events if event["event"] == "peer_alive"]
    assert (alive["device"], alive["peer"]) == ("attic", "barn")
