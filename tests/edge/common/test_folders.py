"""Replacing a folder in one step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_edge.common import folders
from nmoe_edge.common.folders import check_replaceable, staged_folder

MARKER = "marker.json"
OURS = r"marker\.json|inner/file"


def write(folder, text="new"):
    with staged_folder(folder, MARKER, OURS) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text(text)
        (staging / MARKER).write_text(text)


def test_a_new_folder_is_written_with_its_parents(tmp_path):
    write(tmp_path / "deep" / "place")
    assert (tmp_path / "deep" / "place" / "inner" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["place"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "place", "old")
    write(tmp_path / "place", "new")
    assert (tmp_path / "place" / "inner" / "file").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["inner", MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("trouble", [OSError, KeyboardInterrupt])
def test_an_exception_while_writing_keeps_the_old_folder(tmp_path, trouble):
    write(tmp_path / "place", "old")
    with pytest.raises(trouble), staged_folder(tmp_path / "place", MARKER, OURS) as staging:
        (staging / MARKER).write_text("new")
        raise trouble
    assert (tmp_path / "place" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "place").mkdir()
    write(tmp_path / "place")
    assert (tmp_path / "place" / MARKER).is_file()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_without_an_atomic_exchange_the_folder_is_replaced_in_two_renames(tmp_path, monkeypatch, can_exchange):
    write(tmp_path / "place", "old")
    if not can_exchange:
        monkeypatch.setattr("nmoe_edge.common.folders._exchange", lambda one, other: False)
    write(tmp_path / "place", "new")
    assert (tmp_path / "place" / MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_swap_that_fails_half_way_restores_the_old_folder(tmp_path, monkeypatch):
    write(tmp_path / "place", "old")
    monkeypatch.setattr("nmoe_edge.common.folders._exchange", lambda one, other: False)
    rename = Path.rename

    def fail_to_arrive(path, target):
        if target.name == "place" and not path.name.endswith(".old"):
            raise OSError(5, "the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_to_arrive)
    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path / "place", "new")
    assert (tmp_path / "place" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_every_file_is_flushed_before_the_folder_is_renamed(tmp_path, monkeypatch):
    real_fsync = os.fsync
    flushed = []

    def fsync(handle):
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink())
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "place")
    assert flushed[-1].name == tmp_path.name
    assert {"file", "inner", MARKER} <= {path.name for path in flushed}


@pytest.mark.parametrize("kind", ["folder without the marker", "foreign file", "file", "link"])
def test_a_foreign_folder_is_never_replaced(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "folder without the marker":
        place.mkdir()
        (place / "inner").mkdir()
        (place / "inner" / "file").touch()
    elif kind == "foreign file":
        write(place)
        (place / "inner" / "thesis").touch()
    elif kind == "file":
        place.touch()
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="choose another place"):
        write(place)


def test_a_folder_can_be_read_by_others(tmp_path):
    write(tmp_path / "place")
    assert (tmp_path / "place").stat().st_mode & 0o777 == 0o755


def test_a_destination_that_cannot_be_created_is_refused_in_advance(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(ValueError, match="file is not a folder; choose another place"):
            check_replaceable(place, MARKER, OURS)
    check_replaceable(tmp_path / "deep" / "place", MARKER, OURS)
    # Not with chmod: root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="cannot be written to; choose another place"):
        check_replaceable(tmp_path / "deep" / "place", MARKER, OURS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


STUCK = """
import sys, time
from pathlib import Path
from nmoe_edge.common.folders import staged_folder

with staged_folder(Path(sys.argv[1]), "marker.json", ".*") as staging:
    (staging / "half").write_text("of a file")
    print(staging.name, flush=True)
    time.sleep(60)
"""


def test_the_temporary_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_is_kept(tmp_path):
    place = tmp_path / "place"
    others = [".place.original", ".place.12345678.staged.old", ".other.12345678.staged", "place.12345678.staged"]
    for name in others:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", STUCK, str(place)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    living = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        left = killed.stdout.readline().strip()
        kept = living.stdout.readline().strip()
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert (tmp_path / left / "half").exists()
        write(place)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, kept, "place"])
        assert (tmp_path / kept / "half").exists()
    finally:
        living.kill()
        living.communicate()


def test_a_temporary_folder_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    real_flock = folders.fcntl.flock
    removed = []

    def flock(handle, operation):
        if not removed:
            removed.append(Path(f"/proc/self/fd/{handle}").readlink())
            removed[0].rmdir()
        real_flock(handle, operation)

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    write(tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert removed[0].name.endswith(".staged")


def test_a_temporary_folder_removed_before_it_is_opened_is_created_again(tmp_path, monkeypatch):
    real_mkdtemp = folders.tempfile.mkdtemp
    made = []

    def mkdtemp(**options):
        made.append(Path(real_mkdtemp(**options)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(folders.tempfile, "mkdtemp", mkdtemp)
    write(tmp_path / "place")
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_the_root_folder_is_refused(monkeypatch):
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: [path / "foreign"])  # listing all of / takes too long
    with pytest.raises(ValueError, match="which would be lost|cannot be written to"):
        check_replaceable(Path("/"), MARKER, "nothing")
