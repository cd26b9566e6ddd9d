from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.cli import main


@pytest.fixture
def nmoe_edge(run_main):
    return lambda *arguments: run_main(main, *arguments)


def test_help_shows_every_command_and_an_example_of_each(nmoe_edge):
    shown = nmoe_edge("--help")
    assert shown.exit_code == 0
    for command in ("inspect", "selftest"):
        assert command in shown.output
        explained = nmoe_edge(command, "--help").output
        assert "Example" in explained
        assert f"nmoe-edge {command} bundles/digits/device-00" in explained


def test_it_runs_as_a_module():
    module = [sys.executable, "-W", "error", "-m", "nmoe_edge", "--version"]
    shown = subprocess.run(module, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.startswith("nmoe-edge ")


def test_inspect_describes_a_bundle(nmoe_edge, tiny_fleet):
    shown = nmoe_edge("inspect", tiny_fleet / "barn")
    assert shown.exit_code == 0
    assert "barn, expert 1 of 3" in shown.output
    assert "verified" in shown.output


def test_inspect_describes_a_fleet(nmoe_edge, tiny_fleet):
    shown = nmoe_edge("inspect", tiny_fleet)
    assert shown.exit_code == 0
    assert "3 bundles of one trunk" in shown.output


def test_inspect_names_the_missing_bundles_of_a_fleet(nmoe_edge, tiny_fleet, tmp_path):
    shutil.copytree(tiny_fleet / "barn", tmp_path / "barn")
    shutil.copy(tiny_fleet / "fleet.toml", tmp_path)
    shown = nmoe_edge("inspect", tmp_path)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("bundle not in this folder")] == ["attic", "cellar"]
    assert lines[-1].startswith("verified: 1 bundle of one trunk")


def test_inspect_prints_json(nmoe_edge, tiny_fleet):
    assert json.loads(nmoe_edge("inspect", "--json", tiny_fleet / "barn").output)["device"] == "barn"
    assert len(json.loads(nmoe_edge("inspect", "--json", tiny_fleet).output)["device"]) == 3


def test_selftest_checks_every_given_bundle(nmoe_edge, tiny_fleet):
    shown = nmoe_edge("selftest", *(tiny_fleet / name for name in ("attic", "barn", "cellar")))
    assert shown.exit_code == 0
    assert shown.output.count("passed on 3 inputs") == 3
    lines = nmoe_edge("selftest", "--json", "--threads", "2", tiny_fleet / "attic").output.splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [True]


def test_a_fleet_folder_stands_for_the_bundles_in_it(nmoe_edge, tiny_fleet, tmp_path):
    shown = nmoe_edge("selftest", tiny_fleet)
    assert [line.partition(":")[0] for line in shown.output.splitlines()] == [
        str(tiny_fleet / name) for name in ("attic", "barn", "cellar")
    ]
    board = tmp_path / "board"
    shutil.copytree(tiny_fleet / "barn", board / "barn")
    shutil.copy(tiny_fleet / "fleet.toml", board)
    assert nmoe_edge("selftest", board).output.count("passed") == 1
    shutil.rmtree(board / "barn")
    assert nmoe_edge("selftest", board).exit_code == 1


def test_a_failed_selftest_is_exit_1(nmoe_edge, tiny_fleet, tmp_path):
    # The digests match, but the expert is another device's: only the self-test can notice.
    barn, attic = read_bundle(tiny_fleet / "barn"), read_bundle(tiny_fleet / "attic")
    forged = {**barn.contents, "expert.onnx": attic.contents["expert.onnx"]}
    write_bundle(tmp_path / "forged", barn.manifest, forged)
    shown = nmoe_edge("selftest", tiny_fleet / "barn", tmp_path / "forged")
    assert shown.exit_code == 1
    assert "FAILED" in shown.output.splitlines()[1]


@pytest.mark.parametrize("command", ["inspect", "selftest"])
def test_a_damaged_bundle_is_one_line_and_exit_1(nmoe_edge, tiny_fleet, tmp_path, command):
    folder = shutil.copytree(tiny_fleet / "barn", tmp_path / "barn")
    (folder / "expert.onnx").write_bytes(b"x")
    shown = nmoe_edge(command, folder)
    assert shown.exit_code == 1
    assert shown.error.startswith(f"nmoe-edge: {folder / 'expert.onnx'}: ")
    assert shown.error.count("\n") == 1


def test_a_missing_extra_is_an_error_with_the_pip_command(nmoe_edge, tiny_fleet, monkeypatch):
    monkeypatch.delitem(sys.modules, "nmoe_edge.models", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    shown = nmoe_edge("selftest", tiny_fleet / "barn")
    assert shown.exit_code == 1
    assert shown.error == "nmoe-edge: onnxruntime is not installed; pip install 'nmoe[edge]'\n"
    assert nmoe_edge("inspect", tiny_fleet / "barn").exit_code == 0


def test_a_bug_shows_its_traceback(nmoe_edge, tiny_fleet, monkeypatch):
    monkeypatch.setattr("nmoe_edge.bundle.folder.parse_manifest", None)
    with pytest.raises(TypeError):
        nmoe_edge("inspect", tiny_fleet / "barn")


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\nb\x1b[2J"])
@pytest.mark.parametrize("command", ["inspect", "selftest"])
def test_an_impossible_path_is_one_line(nmoe_edge, tmp_path, command, name):
    shown = nmoe_edge(command, tmp_path / name)
    assert shown.exit_code == 1
    assert shown.error.startswith("nmoe-edge: ")
    assert shown.error.count("\n") == 1
    assert "\x1b" not in shown.error


def test_an_unexpected_file_name_cannot_print_another_line(nmoe_edge, tiny_fleet, tmp_path):
    folder = shutil.copytree(tiny_fleet / "barn", tmp_path / "barn")
    (folder / "a\nverified: every file").touch()
    shown = nmoe_edge("inspect", folder)
    assert (shown.exit_code, shown.error.count("\n")) == (1, 1)


def test_a_full_disk_is_one_line_and_a_closed_pipe_is_silent(tiny_fleet):
    command = [sys.executable, "-m", "nmoe_edge", "inspect", str(tiny_fleet)]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "nmoe-edge: cannot write to stdout: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_characters_that_the_terminal_lacks_are_replaced():
    code = """
import click
from nmoe_edge.common.command import run_program
run_program(click.command()(lambda: click.echo("a \u2192 b")), "arrows", ValueError, "edge", ())
"""
    western = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=western, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"a ? b\n", b"")
