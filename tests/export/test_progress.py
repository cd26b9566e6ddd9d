"""What is said while an export works."""

from __future__ import annotations

import sys

import pytest

from nmoe_export.progress import Count, Terminal


@pytest.fixture
def say():
    return Terminal()


def count(say, upto=3, total=3):
    for number in range(1, upto + 1):
        say(Count("device {} written", number, total))


def test_elsewhere_only_the_last_of_what_counts_is_kept(say, capsys):
    say("begin")
    count(say)
    say("end")
    count(say, upto=2)
    say.end()
    assert capsys.readouterr() == ("", "begin\ndevice 3 of 3 written\nend\ndevice 2 of 3 written\n")


def test_on_a_terminal_it_is_one_line_that_changes(say, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    count(say)
    count(say, upto=1)
    say("what comes next has a line of its own")
    say.end()
    clear = "\r\x1b[K"
    first = "".join(f"{clear}device {n} of 3 written" for n in (2, 3))
    shown = capsys.readouterr().err
    assert first in shown
    assert shown.endswith(f"{clear}device 1 of 3 written\nwhat comes next has a line of its own\n")
    assert shown.count("\n") == 3


def test_to_whoever_takes_lines_a_count_is_a_line():
    assert Count("node {} tried", 2, 7) == "node 2 of 7 tried"
