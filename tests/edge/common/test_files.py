"""Replacing a file in one step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_edge.common import files
from nmoe_edge.common.files import replace_file


def test_replacing_a_file_leaves_no_temporary_file(tmp_path):
    replace_file(tmp_path / "facts.json", "first")
    replace_file(tmp_path / "facts.json", "sécond".encode())
    assert (tmp_path / "facts.json").read_text() == "sécond"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_new_file_gets_its_mode_from_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "facts.json", "first")
    finally:
        os.umask(before)
    assert (tmp_path / "facts.json").stat().st_mode & 0o777 == 0o640


def test_writing_through_a_link_replaces_its_target(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/facts.json")
    replace_file(tmp_path / "link", "first")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "facts.json").read_text() == "first"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    replace_file(tmp_path / "facts.json", "first")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "facts.json", "second")
    assert (tmp_path / "facts.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_temporary_file_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    real_flock = files.fcntl.flock
    removed = []

    def flock(file, operation):
        if not removed:
            removed.append(file.name)
            Path(file.name).unlink()
        real_flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    replace_file(tmp_path / "facts.json", "first")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_with_the_longest_name_is_replaced(tmp_path):
    path = tmp_path / ("a" * 255)
    replace_file(path, "first")
    assert path.read_text() == "first"


def test_a_link_that_points_to_itself_is_replaced(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    replace_file(tmp_path / "loop", "first")
    assert (tmp_path / "loop").read_text() == "first"


def test_only_a_durable_write_waits_for_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.os, "fsync", flushed.append)
    replace_file(tmp_path / "facts.json", "first", durable=False)
    assert not flushed
    replace_file(tmp_path / "facts.json", "second")
    assert len(flushed) == 1


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


def test_the_temporary_file_of_a_killed_writer_is_removed_and_that_of_a_running_one_is_kept(tmp_path):
    path = tmp_path / "facts.json"
    others = [".facts.json.20251125.new", ".12345678.new", "12345678.nmoe-new"]
    for name in others:
        (tmp_path / name).write_text("of another program")
    command = [sys.executable, "-c", STUCK, str(path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    living = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for process in (killed, living):
            assert process.stdout.readline() == "writing\n"
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert len(list(tmp_path.glob(".*.nmoe-new"))) == 2
        replace_file(path, "whole")
        assert len(list(tmp_path.glob(".*.nmoe-new"))) == 1
        assert path.read_text() == "whole"
        assert all((tmp_path / name).exists() for name in others)
    finally:
        living.kill()
        living.communicate()
