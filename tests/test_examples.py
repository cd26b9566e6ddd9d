"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import TESTS
from edge.fleets import settled


def test_a_fleet_in_one_process_answers_also_without_an_expert(tiny_fleet):
    script = TESTS.parent / "examples" / "one_process_fleet.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, tiny_fleet], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if "answered" in line] == ["top", "middle", "bottom"] * 2
    assert done.stdout.count("degraded, expert 1 is missing") == 1


@pytest.mark.socket
def test_three_devices_serve_and_one_dies(tiny_fleet, tmp_path):
    script = TESTS.parent / "examples" / "three_devices.py"
    folder = settled(tiny_fleet, tmp_path / "fleet")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, folder], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert [line.split("by ")[1] for line in lines[1:4]] == [f"expert {number} (100%)" for number in range(3)]
    assert lines[5] == "the same without cellar:"
    assert sum("degraded" in line for line in lines) == 1
