"""Files that are replaced in one step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_edge.common import files
from nmoe_edge.common.files import replace_file


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    replace_file(tmp_path / "facts.json", "first")
    replace_file(tmp_path / "facts.json", "sécond".encode())
    assert (tmp_path / "facts.json").read_text() == "sécond"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "facts.json", "first")
    finally:
        os.umask(before)
    assert (tmp_path / "facts.json").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/facts.json")
    replace_file(tmp_path / "link", "first")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "facts.json").read_text() == "first"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    replace_file(tmp_path / "facts.json", "first")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "facts.json", "second")
    assert (tmp_path / "facts.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    true, taken = files.fcntl.flock, []

    def flock(file, operation):
        if not taken:
            taken.append(file.name)
            Path(file.name).unlink()
        true(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    replace_file(tmp_path / "facts.json", "first")
    assert taken
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


STUCK = """
import os, sys, time
from pathlib import Path
from nmoe_edge.common import files

def forever(handle):
    print("writing", flush=True)
    time.sleep(60)

files.os.fsync = forever
files.replace_file(Path(sys.argv[1]), "half")
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "facts.json"
    (tmp_path / ".other.json.12345678.new").write_text("another file's")
    command = [sys.executable, "-c", STUCK, str(path)]
    killed, living = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        for process in (killed, living):
            assert process.stdout.readline() == "writing\n"
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert len(list(tmp_path.glob(".facts.json.*.new"))) == 2
        replace_file(path, "whole")
        assert len(list(tmp_path.glob(".facts.json.*.new"))) == 1
        assert path.read_text() == "whole"
        assert (tmp_path / ".other.json.12345678.new").exists()
    finally:
        living.kill()
        living.communicate()
