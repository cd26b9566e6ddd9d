from __future__ import annotations

import json
from dataclasses import replace

import pytest
from edge.bench.records import changed

from nmoe_edge.bench.record import check_writable, read_record, write_record
from nmoe_edge.common.schema import to_plain
from nmoe_edge.errors import BenchError


def test_a_written_record_is_read_back_unchanged(record, tmp_path):
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json") == record
    write_record(tmp_path / "a.json", changed(record, "gate", 2))
    assert read_record(tmp_path / "a.json") != record
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_that_cannot_be_written_leaves_the_old_file(record, tmp_path):
    write_record(tmp_path / "a.json", record)
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a.json", replace(record, duration_s=float("nan")))
    assert read_record(tmp_path / "a.json") == record
    with pytest.raises(BenchError, match="cannot be written"):
        write_record(tmp_path, record)


@pytest.mark.parametrize("path", [".", "nowhere/a.json", "a.json/b.json"])
def test_a_path_that_cannot_be_written_is_refused_before_measuring(tmp_path, path):
    (tmp_path / "a.json").touch()
    check_writable(tmp_path / "b.json")
    with pytest.raises(BenchError, match="choose another file"):
        check_writable(tmp_path / path)


def plain_row(parts, scenario="local"):
    """A row as it stands in the JSON of a record."""
    return {"scenario": scenario, "what": "x", "setting": "", "rows": 1, "parts": parts}


HOSTILE = {
    "not JSON": "{",
    "not an object": "[1]",
    "empty": "",
    "NaN": '{"schema": NaN}',
    "another schema": '{"schema": 2, "new": 1}',
    "an unknown key": {"colour": "red"},
    "a schema of another type": {"schema": "1"},
    "no rounds": {"rows": [plain_row([])]},
    "a round without samples": {"rows": [plain_row([[]])]},
    "a negative time": {"rows": [plain_row([[-1]])]},
    "a time too large": {"rows": [plain_row([[2**70]])]},
    "a time that is a boolean": {"rows": [plain_row([[True]])]},
    "an unknown scenario": {"rows": [plain_row([[1]], scenario="moon")]},
    "a row twice": {"rows": 2 * [plain_row([[1]])]},
    "too many rounds": {"rows": [plain_row([[1]] * 31)]},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_an_invalid_record_is_an_error_that_names_the_file(record, tmp_path, how):
    bad, path = HOSTILE[how], tmp_path / "bad.json"
    path.write_text(bad if isinstance(bad, str) else json.dumps(to_plain(record) | bad))
    with pytest.raises(BenchError, match=r"bad\.json: not a record of nmoe-edge bench: ") as refused:
        read_record(path)
    assert len(str(refused.value)) < 500


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(BenchError):
            read_record(path)


def test_a_symbolic_link_to_a_record_stays_a_link(record, tmp_path):
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    write_record(kept, record)
    link.symlink_to(kept)
    check_writable(link)
    write_record(link, replace(record, began="later"))
    assert link.is_symlink()
    assert read_record(kept).began == "later"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "link.json"]
