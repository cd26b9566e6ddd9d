from __future__ import annotations

import pytest

from nmoe_edge.folders import staged_folder

MARKER = "marker.json"


def write(folder, text="new"):
    with staged_folder(folder, MARKER) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text(text)
        (staging / MARKER).write_text(text)


def test_a_folder_is_there_as_a_whole(tmp_path):
    write(tmp_path / "deep" / "place")
    assert (tmp_path / "deep" / "place" / "inner" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["place"]


def test_what_was_there_is_replaced_whole(tmp_path):
    write(tmp_path / "place", "old")
    (tmp_path / "place" / "left over").write_text("of the old")
    write(tmp_path / "place", "new")
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["inner", MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("trouble", [OSError, KeyboardInterrupt])
def test_trouble_in_the_middle_leaves_the_old_one_and_nothing_else(tmp_path, trouble):
    write(tmp_path / "place", "old")
    with pytest.raises(trouble), staged_folder(tmp_path / "place", MARKER) as staging:
        (staging / MARKER).write_text("new")
        raise trouble
    assert (tmp_path / "place" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "place").mkdir()
    write(tmp_path / "place")
    assert (tmp_path / "place" / MARKER).is_file()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_ours_is_left_alone(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
        (place / "thesis").touch()
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
