from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from nmoe_edge.common.log import EVENTS, LOGGER, LoggingLog, StderrLog
from nmoe_edge.protocol.health import Failure

SERVING = Path(__file__).parents[3] / "nmoe_edge" / "device" / "SERVING.md"


@pytest.fixture
def clock(monkeypatch):
    """A list with one number, the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_for_people_names_device_event_peer_and_text(lines):
    StderrLog("attic")("peer_lost", "not asked until it is back", peer="barn")
    StderrLog("attic")("peer_alive", peer="barn")
    StderrLog("attic")("leaving", "2 requests to finish")
    StderrLog("attic")("leaving")
    first, second, third, fourth = lines()
    assert first.endswith(" attic peer_lost: barn: not asked until it is back")
    assert re.fullmatch(r"\d\d:\d\d:\d\d attic peer_alive: barn", second)
    assert third.endswith(" attic leaving: 2 requests to finish")
    assert fourth.endswith(" attic leaving")


def test_a_line_of_json_holds_text_peer_and_fields(lines):
    StderrLog("attic", as_json=True)("peer_lost", 'a "reason"\nof two lines', peer="barn", rows=3)
    (line,) = lines()
    found = json.loads(line)
    assert found.pop("time") > 0
    text = 'a "reason"\nof two lines'
    assert found == {"device": "attic", "event": "peer_lost", "text": text, "peer": "barn", "rows": 3}


def test_an_event_without_text_or_peer_has_neither_in_json(lines):
    StderrLog("attic", as_json=True)("leaving")
    assert json.loads(lines()[0]).keys() == {"time", "device", "event"}


def test_nothing_is_written_to_stdout(capsys):
    StderrLog("attic")("leaving")
    assert capsys.readouterr().out == ""


def test_text_from_outside_cannot_start_a_line_of_its_own(capsys):
    StderrLog("attic")("peer_refuses", "no\n12:00:00 attic all is well\x1b[2J\r", peer="barn")
    written = capsys.readouterr().err
    assert (written.count("\n"), "\x1b" in written, "\r" in written) == (1, False, False)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_repeated_event_is_logged_once_a_minute_with_the_number_left_out(lines, clock, as_json):
    log = StderrLog("attic", as_json)
    for at in (0.0, 1.0, 30.0, 59.9):
        clock[0] = at
        log.rarely("message_malformed", "no frames")
    assert len(lines()) == 1
    clock[0] = 60.0
    log.rarely("message_malformed", "no frames")
    (line,) = lines()
    assert "3 more" in line
    assert not as_json or json.loads(line)["held"] == 3


def test_the_number_left_out_is_reported_once(lines, clock):
    log = StderrLog("attic", as_json=True)
    for at in (0.0, 1.0, 60.0, 120.0):
        clock[0] = at
        log.rarely("message_malformed")
    assert [json.loads(line)["held"] for line in lines()] == [0, 1, 0]


def test_the_limit_is_per_event_and_peer(lines, clock):
    log = StderrLog("attic")
    log.rarely("peer_lost", peer="barn")
    log.rarely("peer_lost", peer="cellar")
    log.rarely("peer_silent", peer="barn")
    log.rarely("peer_lost", peer="barn")
    assert len(lines()) == 3


def test_the_first_event_is_logged_even_when_the_machine_has_just_started(lines, clock):
    clock[0] = 0.5
    StderrLog("attic").rarely("peer_lost", peer="barn")
    assert len(lines()) == 1


def test_a_stderr_that_cannot_be_written_is_ignored():
    with Path("/dev/full").open("w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        StderrLog("attic")("leaving")
        with contextlib.suppress(OSError):
            full.close()
        StderrLog("attic")("leaving")
        patch.setattr(sys, "stderr", None)
        StderrLog("attic")("leaving")


@pytest.mark.parametrize("log", [StderrLog("attic"), LoggingLog("attic")])
def test_an_event_that_is_not_listed_is_an_error(log):
    with pytest.raises(KeyError, match="barn lost"):
        log("barn lost")
    with pytest.raises(KeyError, match="barn lost"):
        log.rarely("barn lost")


def test_pythons_logging_gets_device_event_and_fields_of_their_own(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    LoggingLog("attic")("peer_found", "tcp://127.0.0.1:1", peer="barn", rows=3)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("nmoe", "INFO")
    assert record.getMessage() == "attic peer_found: barn: tcp://127.0.0.1:1"
    assert (record.device, record.event, record.peer, record.rows) == ("attic", "peer_found", "barn", 3)


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_reaches_pythons_logging_at_its_level(event, caplog):
    caplog.set_level(logging.DEBUG, LOGGER)
    LoggingLog("attic").rarely(event, peer="barn")
    (record,) = caplog.records
    assert (record.levelno, record.event, record.held) == (EVENTS[event].level, event, 0)


def test_a_record_factory_that_uses_our_names_does_not_stop_the_device(caplog):
    factory = logging.getLogRecordFactory()

    def with_a_device(*arguments, **more):
        record = factory(*arguments, **more)
        record.device = "the application's"
        return record

    logging.setLogRecordFactory(with_a_device)
    try:
        with caplog.at_level(logging.INFO, LOGGER):
            LoggingLog("attic")("peer_found", "tcp://127.0.0.1:1", peer="barn")
    finally:
        logging.setLogRecordFactory(factory)
    assert "attic peer_found: barn: tcp://127.0.0.1:1 (without its fields: KeyError" in caplog.text


def test_every_listed_event_is_logged_somewhere():
    source = "".join(path.read_text() for path in SERVING.parent.glob("*.py"))
    put_together = {f"peer_{failure}" for failure in get_args(Failure)}
    assert {event for event in EVENTS if f'"{event}"' not in source} <= put_together <= EVENTS.keys()


def test_serving_md_lists_every_event_with_its_level_and_meaning():
    section = SERVING.read_text().partition("### Log events")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", section, re.M)
    assert rows == [(name, logging.getLevelName(event.level), event.meaning) for name, event in EVENTS.items()]
