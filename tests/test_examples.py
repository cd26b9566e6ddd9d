"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys

from conftest import TESTS


def test_a_fleet_in_one_process_answers_also_without_an_expert(tiny_fleet):
    script = TESTS.parent / "examples" / "one_process_fleet.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, tiny_fleet], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if "answered" in line] == ["top", "middle", "bottom"] * 2
    assert done.stdout.count("degraded, expert 1 is missing") == 1
