"""Progress on a terminal and in a log file."""

from __future__ import annotations

import sys

import pytest

from nmoe_edge.common import progress
from nmoe_edge.common.progress import Count, ProgressLine

CLEAR = "\r\x1b[K"


@pytest.fixture
def line():
    return ProgressLine()


def count(line, upto=3, total=3):
    for number in range(1, upto + 1):
        line(Count("device {} written", number, total))


def test_in_a_log_file_only_the_last_count_of_a_series_is_written(line, capsys):
    line("begin")
    count(line)
    line("end")
    count(line, upto=2)
    line.end()
    assert capsys.readouterr() == ("", "begin\ndevice 3 of 3 written\nend\ndevice 2 of 3 written\n")


def test_on_a_terminal_counts_overwrite_each_other(line, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    count(line)
    count(line, upto=1)
    line("what comes next has a line of its own")
    line.end()
    first = "".join(f"{CLEAR}device {n} of 3 written" for n in (2, 3))
    shown = capsys.readouterr().err
    assert first in shown
    assert shown.endswith(f"{CLEAR}device 1 of 3 written\nwhat comes next has a line of its own\n")
    assert shown.count("\n") == 3


def test_a_count_is_plain_text_to_any_other_progress_function():
    assert Count("node {} tried", 2, 7) == "node 2 of 7 tried"


def test_in_a_log_file_updates_are_written_at_most_every_so_many_seconds(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    line = ProgressLine(every_s=5.0)
    for second in range(8):
        clock[0] = 100.0 + second
        line.update(f"second {second}", last=second == 7)
    assert capsys.readouterr().err.splitlines() == ["second 0", "second 6", "second 7"]
    line.end()
    assert capsys.readouterr().err == ""
