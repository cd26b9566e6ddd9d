from __future__ import annotations

import os
from pathlib import Path

import pytest

from nmoe_edge.folders import staged_folder

MARKER = "marker.json"
OURS = r"marker\.json|inner/file"


def write(folder, text="new"):
    with staged_folder(folder, MARKER, OURS) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text(text)
        (staging / MARKER).write_text(text)


def test_a_folder_is_there_as_a_whole(tmp_path):
    write(tmp_path / "deep" / "place")
    assert (tmp_path / "deep" / "place" / "inner" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["place"]


def test_what_was_there_is_replaced_whole(tmp_path):
    write(tmp_path / "place", "old")
    write(tmp_path / "place", "new")
    assert (tmp_path / "place" / "inner" / "file").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["inner", MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("trouble", [OSError, KeyboardInterrupt])
def test_trouble_in_the_middle_leaves_the_old_one_and_nothing_else(tmp_path, trouble):
    write(tmp_path / "place", "old")
    with pytest.raises(trouble), staged_folder(tmp_path / "place", MARKER, OURS) as staging:
        (staging / MARKER).write_text("new")
        raise trouble
    assert (tmp_path / "place" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "place").mkdir()
    write(tmp_path / "place")
    assert (tmp_path / "place" / MARKER).is_file()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_without_an_exchange_in_one_step_two_do(tmp_path, monkeypatch, can_exchange):
    write(tmp_path / "place", "old")
    if not can_exchange:
        monkeypatch.setattr("nmoe_edge.folders._exchange", lambda one, other: False)
    write(tmp_path / "place", "new")
    assert (tmp_path / "place" / MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_swap_that_fails_half_way_puts_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "place", "old")
    monkeypatch.setattr("nmoe_edge.folders._exchange", lambda one, other: False)
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


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(Path(f"/proc/self/fd/{handle}").readlink()), fsync(handle))
    )
    write(tmp_path / "place")
    assert flushed[-1].name == tmp_path.name
    assert {"file", "inner", MARKER} <= {path.name for path in flushed}


@pytest.mark.parametrize("kind", ["folder", "stranger", "file", "link"])
def test_what_is_not_ours_is_left_alone(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
        (place / "inner").mkdir()
        (place / "inner" / "file").touch()
    elif kind == "stranger":
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
