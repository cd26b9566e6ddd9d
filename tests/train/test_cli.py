from __future__ import annotations

import json
import shutil
import sys

import pytest

from nmoe_train.cli import main


@pytest.fixture
def nmoe_train(run_main):
    return lambda *arguments: run_main(main, *arguments)


def test_help_shows_an_example(nmoe_train):
    assert "Example: nmoe-train inspect" in nmoe_train("inspect", "--help").output


def test_inspect_says_what_a_run_is(nmoe_train, golden):
    shown = nmoe_train("inspect", golden / "run")
    assert shown.exit_code == 0
    assert "bands, 12 samples" in shown.output
    assert "verified" in shown.output


def test_inspect_speaks_json(nmoe_train, golden):
    shown = json.loads(nmoe_train("inspect", "--json", golden / "run").output)
    assert shown["run"]["experts"] == 3
    assert shown["metrics"] == {"note": "untrained"}


def test_a_broken_run_is_one_line(nmoe_train, golden, tmp_path):
    folder = shutil.copytree(golden / "run", tmp_path / "run")
    (folder / "gates" / "02.safetensors").unlink()
    shown = nmoe_train("inspect", folder)
    assert shown.exit_code == 1
    assert shown.error == f"nmoe-train: {folder / 'gates/02.safetensors'}: No such file or directory\n"


def test_without_the_extra_the_pip_line_that_brings_it_is_printed(nmoe_train, golden, monkeypatch):
    monkeypatch.delitem(sys.modules, "nmoe_train.run", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    shown = nmoe_train("inspect", golden / "run")
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == "nmoe-train: torch is not installed; pip install 'nmoe[train]'\n"
