from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from nmoe_edge.bundle import read_bundle, write_bundle


def nmoe_edge(*arguments, code="from nmoe_edge.cli import main; main()"):
    """The command as a person runs it, in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_every_command_and_an_example_of_each():
    shown = nmoe_edge("--help")
    assert shown.returncode == 0
    for command in ("inspect", "selftest"):
        assert command in shown.stdout
        assert f"Example: nmoe-edge {command}" in nmoe_edge(command, "--help").stdout


def test_it_is_a_module_too():
    module = [sys.executable, "-m", "nmoe_edge", "--version"]
    shown = subprocess.run(module, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.startswith("nmoe-edge ")


def test_inspect_says_what_a_bundle_is(tiny_fleet):
    shown = nmoe_edge("inspect", tiny_fleet / "barn")
    assert shown.returncode == 0
    assert "barn, expert 1 of 3" in shown.stdout
    assert "verified" in shown.stdout


def test_inspect_says_what_a_fleet_is(tiny_fleet):
    shown = nmoe_edge("inspect", tiny_fleet)
    assert shown.returncode == 0
    assert "3 bundles of one trunk" in shown.stdout


def test_inspect_speaks_json(tiny_fleet):
    assert json.loads(nmoe_edge("inspect", "--json", tiny_fleet / "barn").stdout)["device"] == "barn"
    assert len(json.loads(nmoe_edge("inspect", "--json", tiny_fleet).stdout)["device"]) == 3


def test_selftest_replays_every_bundle(tiny_fleet):
    shown = nmoe_edge("selftest", *(tiny_fleet / name for name in ("attic", "barn", "cellar")))
    assert shown.returncode == 0
    assert shown.stdout.count("passed on 3 inputs") == 3
    lines = nmoe_edge("selftest", "--json", "--threads", "2", tiny_fleet / "attic").stdout.splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [True]


def test_a_selftest_that_fails_is_exit_1(tiny_fleet, tmp_path):
    # The expert of another device, sealed as if it were right: only the replay can tell.
    barn, attic = read_bundle(tiny_fleet / "barn"), read_bundle(tiny_fleet / "attic")
    forged = {**barn.contents, "expert.onnx": attic.contents["expert.onnx"]}
    write_bundle(tmp_path / "forged", barn.manifest, forged)
    shown = nmoe_edge("selftest", tiny_fleet / "barn", tmp_path / "forged")
    assert shown.returncode == 1
    assert "FAILED" in shown.stdout.splitlines()[1]


@pytest.mark.parametrize("command", ["inspect", "selftest"])
def test_a_damaged_bundle_is_one_line_and_exit_1(tiny_fleet, tmp_path, command):
    folder = shutil.copytree(tiny_fleet / "barn", tmp_path / "barn")
    (folder / "expert.onnx").write_bytes(b"x")
    shown = nmoe_edge(command, folder)
    assert shown.returncode == 1
    assert shown.stderr.startswith(f"nmoe-edge: {folder / 'expert.onnx'}: ")
    assert shown.stderr.count("\n") == 1


def test_without_the_extra_the_pip_line_that_brings_it_is_printed(tiny_fleet):
    hide = "import sys; sys.modules['onnxruntime'] = None; from nmoe_edge.cli import main; main()"
    shown = nmoe_edge("selftest", tiny_fleet / "barn", code=hide)
    assert shown.returncode == 1
    assert shown.stderr.startswith("nmoe-edge: onnxruntime is not installed; pip install 'nmoe[edge]'")
    assert shown.stderr.count("\n") == 1
    assert nmoe_edge("inspect", tiny_fleet / "barn", code=hide).returncode == 0


def test_a_bug_shows_its_traceback(tiny_fleet):
    broken = "import nmoe_edge.bundle as b; b.read_bundle = 3; from nmoe_edge.cli import main; main()"
    shown = nmoe_edge("inspect", tiny_fleet / "barn", code=broken)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
