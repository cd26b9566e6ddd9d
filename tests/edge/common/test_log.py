from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest

from nmoe_edge.common.log import Log


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_for_people_names_device_event_and_text(lines):
    Log("attic")("barn lost", "asked nothing more")
    Log("attic")("draining")
    first, second = lines()
    assert first.endswith(" attic barn lost: asked nothing more")
    assert second.endswith(" attic draining")


def test_a_line_of_json_holds_text_and_facts(lines):
    Log("attic", as_json=True)("barn lost", 'a "reason"\nof two lines', peer="barn", rows=3)
    (line,) = lines()
    found = json.loads(line)
    assert found.pop("time") > 0
    text = 'a "reason"\nof two lines'
    assert found == {"device": "attic", "event": "barn lost", "text": text, "peer": "barn", "rows": 3}


def test_an_event_without_text_has_none_in_json(lines):
    Log("attic", as_json=True)("draining")
    assert "text" not in json.loads(lines()[0])


def test_nothing_is_said_on_stdout(capsys):
    Log("attic")("draining")
    assert capsys.readouterr().out == ""


def test_what_a_stranger_said_makes_no_line_of_its_own(capsys):
    Log("attic")("barn refuses us", "no\n12:00:00 attic all is well\x1b[2J\r")
    said = capsys.readouterr().err
    assert (said.count("\n"), "\x1b" in said, "\r" in said) == (1, False, False)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_same_is_said_once_a_minute_with_how_often_it_came(lines, clock, as_json):
    log = Log("attic", as_json)
    for at in (0.0, 1.0, 30.0, 59.9):
        clock[0] = at
        log.rarely("odd message", "from somebody")
    assert len(lines()) == 1
    clock[0] = 60.0
    log.rarely("odd message", "from somebody")
    (line,) = lines()
    assert "3 more" in line
    assert not as_json or json.loads(line)["held"] == 3


def test_what_was_held_is_said_once(lines, clock):
    log = Log("attic", as_json=True)
    for at in (0.0, 1.0, 60.0, 120.0):
        clock[0] = at
        log.rarely("odd message")
    assert [json.loads(line)["held"] for line in lines()] == [0, 1, 0]


def test_another_event_is_not_held_back(lines, clock):
    log = Log("attic")
    log.rarely("barn lost")
    log.rarely("cellar lost")
    assert len(lines()) == 2


def test_the_first_is_said_even_when_the_machine_has_just_started(lines, clock):
    clock[0] = 0.5
    Log("attic").rarely("barn lost")
    assert len(lines()) == 1


def test_a_log_that_nobody_can_write_to_any_more_is_done_without():
    with Path("/dev/full").open("w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        Log("attic")("barn lost")
        with contextlib.suppress(OSError):
            full.close()
        Log("attic")("barn lost")
        patch.setattr(sys, "stderr", None)
        Log("attic")("barn lost")
