from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nmoe_edge.bench.board import Machine, Moment
from nmoe_edge.bench.compare import compared
from nmoe_edge.bench.record import (
    Peers,
    Record,
    Row,
    Stage,
    Start,
    Subject,
    Tally,
    check_writable,
    read_record,
    write_record,
)
from nmoe_edge.bench.tables import comparison_tables, record_tables
from nmoe_edge.common.schema import to_plain
from nmoe_edge.errors import BenchError

CALM = Moment(0.1, "performance", 2400.0, 2400.0, 50.0, "no", "mains")
ALIKE = ((1_000_000,) * 20,) * 5


def step(what, ns, **rest):
    return Row("local", what, "1 thread", 1, ((ns,) * 1500,) * 5, **rest)


@pytest.fixture
def record():
    stages = (
        Stage("python", (20_000_000,) * 5, (14_000_000,) * 5),
        Stage("ready", (300_000_000,) * 5, (None,) * 5),
        Stage("steady", (900_000_000,) * 5, (62 * 2**20,) * 5),
    )
    wire = {"sent_bytes": 132.0, "received_bytes": 104.5, "tally": Tally(100, 1, 2, 0, 97, 50, 7)}
    return Record(
        schema=1,
        began="2025-11-21T12:00:00Z",
        nmoe="0.1.0",
        python="3.11.2",
        runtime="1.20.0",
        provider="CPUExecutionProvider",
        machine=Machine("Raspberry Pi 5", "Arm Cortex-A76", 4, 8 * 2**30, None),
        before=CALM,
        after=CALM,
        bundle=Subject("attic", "0123" * 16, "extractor int8, gate fp32, expert fp32", "int8", {"gate.onnx": 900}),
        duration_s=10.0,
        starts=(Start("1 thread", stages, (30_000_000,) * 5, (None,) * 5),),
        rows=(
            Row("start", "first answer", "1 thread", 1, ((5_000_000,),) * 5),
            step("extractor", 800_000),
            step("gate", 50_000),
            step("expert", 150_000),
            step("whole path", 1_010_000, mean_w=5.0),
            Row("peer", "ask of expert 1", "int8", 8, ALIKE, **wire),
            Row("fleet", "closed loop, 1 client", "attic", 1, ALIKE, **wire),
        ),
    )


def changed(record, name, by):
    """With a row that takes so many times as long."""
    rows = (
        replace(row, parts=tuple(tuple(int(ns * by) for ns in part) for part in row.parts)) if row.what == name else row
        for row in record.rows
    )
    return replace(record, rows=tuple(rows))


def shown_beside(old, new):
    return comparison_tables(old, new, compared(old, new))


def test_what_was_written_is_read(record, tmp_path):
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json") == record
    write_record(tmp_path / "a.json", changed(record, "gate", 2))
    assert read_record(tmp_path / "a.json") != record
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_that_cannot_be_written_leaves_the_old_one(record, tmp_path):
    write_record(tmp_path / "a.json", record)
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a.json", replace(record, duration_s=float("nan")))
    assert read_record(tmp_path / "a.json") == record
    with pytest.raises(BenchError, match="cannot be written"):
        write_record(tmp_path, record)


@pytest.mark.parametrize("place", [".", "nowhere/a.json", "a.json/b.json"])
def test_a_place_that_cannot_be_written_to_is_known_before_the_work(tmp_path, place):
    (tmp_path / "a.json").touch()
    check_writable(tmp_path / "b.json")
    with pytest.raises(BenchError, match="choose another place"):
        check_writable(tmp_path / place)


HOSTILE = {
    "not JSON": "{",
    "no object": "[1]",
    "nothing": "",
    "NaN": '{"schema": NaN}',
    "another schema": '{"schema": 2, "new": 1}',
    "an unknown key": {"colour": "red"},
    "a schema of another type": {"schema": "1"},
    "no rounds": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": []}]},
    "a round without samples": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[]]}]},
    "a negative time": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[-1]]}]},
    "a time beyond all": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[2**70]]}]},
    "a time that is true": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[True]]}]},
    "a scenario of its own": {"rows": [{"scenario": "moon", "what": "x", "setting": "", "rows": 1, "parts": [[1]]}]},
    "a row twice": {"rows": 2 * [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[1]]}]},
    "too many rounds": {"rows": [{"scenario": "local", "what": "x", "setting": "", "rows": 1, "parts": [[1]] * 31}]},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_what_is_no_record_is_refused_in_a_line_that_names_the_file(record, tmp_path, how):
    bad, path = HOSTILE[how], tmp_path / "bad.json"
    path.write_text(bad if isinstance(bad, str) else json.dumps(to_plain(record) | bad))
    with pytest.raises(BenchError, match=r"bad\.json: no record of nmoe-edge bench: ") as refused:
        read_record(path)
    assert len(str(refused.value)) < 500


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(BenchError):
            read_record(path)


def test_a_report_shows_figures_beside_their_conditions_and_dashes_for_what_is_unknown(record):
    lines = record_tables(record).splitlines()
    assert lines[0] == "# attic on Raspberry Pi 5"
    gate = next(line for line in lines if line.startswith("| gate"))
    assert [cell.strip() for cell in gate.split("|")[4:11]] == [
        "7,500",
        "0.0500",
        "0.0500",
        "0.0500",
        "0.0500",
        "0.0%",
        "–",
    ]
    whole = next(line for line in lines if line.startswith("| whole path"))
    assert [cell.strip() for cell in whole.split("|")[-3:-1]] == ["5.00", "5.050"]  # W, mJ
    peer = next(line for line in lines if line.startswith("| ask of expert 1") and "132" in line)
    assert [cell.strip() for cell in peer.split("|")[4:11]] == ["132", "104", "100", "–", "–", "1", "2"]
    fleet = next(line for line in lines if line.startswith("| closed loop") and "51.5%" in line)
    assert "7.2%" in fleet
    assert "Not told by this board: kernel, its peak." in lines
    assert lines[2] == (
        "p50 of one row: 1.010 ms at home, the whole path (1 thread); 1.000 ms to a peer's expert and back (int8);"
        " 1.000 ms through the fleet (closed loop, 1 client)."
    )
    assert lines[4] == "Models ready 0.30 s after a process began; 62.0 MiB when steady, no sockets (1 thread)."
    captions = [line for line in lines if line.startswith(("Latency", "Over the wire"))]
    assert len(captions) == 2
    assert all("Arm Cortex-A76" in line and "performance" in line and "0123" in line for line in captions)


def test_what_nobody_tells_has_no_line_and_no_column_but_is_named_once(record):
    nothing = Moment(None, None, None, None, None, None, None)
    rows = tuple(replace(row, parts=row.parts[:1], mean_w=None) for row in record.rows)
    shown = record_tables(replace(record, before=nothing, after=replace(nothing, load=1.0), rows=rows))
    (untold,) = [line for line in shown.splitlines() if line.startswith("Not told")]
    for what in ("kernel", "governor", "MHz", "°C", "throttled", "power from", "power drawn"):
        assert what in untold
        assert shown.count(what) == 1
    assert "| load average" in shown  # one of its two is known
    assert "mJ" not in shown
    assert "rounds apart" not in shown  # one round lies apart from none


@pytest.mark.parametrize(
    ("ns", "shown"), [(6_130, "0.00613"), (99, "0.0000990"), (48_951, "0.0490"), (605_000, "0.605"), (99_999, "0.1000")]
)
def test_times_have_three_digits_that_count(record, ns, shown):
    rows = (Row("local", "gate", "1 thread", 1, ((ns,),)),)
    assert f"| {shown} " in record_tables(replace(record, rows=rows))


def test_rows_that_all_stayed_at_home_or_all_left_say_so(record):
    fleet = record.rows[-1]
    for at_home, text in ((97, "no row of fleet: closed loop, 1 client, attic, 1 row left"), (0, "answered at home")):
        rows = (replace(fleet, tally=replace(fleet.tally, at_home=at_home)),)
        assert text in record_tables(replace(record, rows=rows))
    assert "no row of" not in record_tables(record)


def test_peers_that_are_not_alive_are_said(record):
    shown = record_tables(replace(record, peers=Peers(3, 3, 2)))
    assert "of 3 peers 3 were alive before, 2 after" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("| peers alive")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["3 of 3", "2 of 3"]
    assert "of 3 peers 2 were alive before, – after" in record_tables(replace(record, peers=Peers(3, 2)))
    assert "were alive" not in record_tables(replace(record, peers=Peers(3, 3, 3)))
    assert "were alive" not in record_tables(replace(record, peers=Peers(0, 0, 0)))


def test_a_record_that_was_stopped_says_where(record):
    assert "it was stopped in round 2 of 5: the graphs" in record_tables(
        replace(record, stopped="stopped in round 2 of 5: the graphs")
    )


def test_graphs_that_do_not_sum_to_the_whole_path_say_how_much_is_elsewhere(record):
    assert "in none of the graphs" not in record_tables(record)
    assert "0.515 ms, 34%, are in none of the graphs" in record_tables(changed(record, "whole path", 1.5))


def test_doubts_say_what_to_do(record):
    assert "performance, or" not in record_tables(record)
    assert "load average was 3.00" in record_tables(replace(record, before=replace(CALM, load=3.0)))
    assert "throttled: no before, 1 times" in record_tables(replace(record, after=replace(CALM, throttled="1 times")))
    shaken = (*record.rows[:1], replace(record.rows[1], parts=((100,), (150,)), settled=False))
    shown = record_tables(replace(record, rows=shaken))
    assert "rounds of 1 of 1 rows differ by more than 10%, most those of local: extractor, 1 thread" in shown
    assert "never settled within 2 s of 1 of 1 rows, such as local: extractor" in shown
    assert "longer --duration" in shown


def test_a_comparison_shows_what_became_of_every_row(record):
    shown = shown_beside(record, changed(record, "gate", 1.5))
    assert "WARNING" not in shown
    (gate,) = [line for line in shown.splitlines() if "local: gate" in line]
    assert "1.500 to 1.500" in gate
    assert gate.rstrip(" |").endswith("worse")
    assert shown.count("| same ") == len(record.rows) - 1 + 1  # memory


def test_another_bundle_and_another_machine_are_a_warning_that_cannot_write_on_the_screen(record):
    other = replace(
        record,
        bundle=replace(record.bundle, digest="\x1b[2J"),
        machine=replace(record.machine, board="Pi\n| 4 |", cores=None),
        before=replace(CALM, governor="powersave"),
    )
    shown = shown_beside(record, other)
    for what in ("bundle", "machine", "governor"):
        assert f"WARNING: another {what} in the second" in shown
    assert "\x1b" not in shown
    assert "\x1b" not in record_tables(other)


def test_rows_that_only_one_has_are_named(record):
    fewer = replace(record, rows=record.rows[1:])
    assert "only in the first: start: first answer" in shown_beside(record, fewer)
    shown = shown_beside(record, replace(record, rows=()))
    assert shown.endswith("local: gate, 1 thread, 1 row; and 4 more")


def test_a_comparison_notes_what_applies_to_what_it_shows(record):
    noisy = replace(record.rows[-1], parts=((1_000_000,), (2_000_000,), *ALIKE[:3]), settled=False)
    other = replace(record, rows=(*record.rows[:-1], noisy))
    shown = shown_beside(record, other)
    assert "1 of 8 rows cannot be told" in shown
    assert "in the second, the warm-up never settled" in shown
    assert "percentile" not in shown
    calm = replace(record, rows=record.rows[:-1])
    assert "never settled" not in shown_beside(calm, other)  # the noisy row is not shown


def test_a_fleet_that_answers_less_is_worse_however_fast_it_is(record):
    fleet = record.rows[-1]
    for what in ("refused", "unanswered", "degraded"):
        tally = replace(fleet.tally, **{what: 60})
        other = replace(record, rows=(*record.rows[:-1], replace(fleet, tally=tally)))
        comparison = compared(record, other)
        assert comparison.worse
        assert f"WORSE: {fleet.name}: " in comparison_tables(record, other, comparison)
        assert f"% {what} before, 6" in comparison_tables(record, other, comparison)
        assert not compared(other, record).worse


def test_more_memory_is_worse(record):
    (start,) = record.starts
    (*stages, steady) = start.stages
    larger = replace(start, stages=(*stages, replace(steady, rss=(70 * 2**20,) * 5)))
    comparison = compared(record, replace(record, starts=(larger,)))
    assert comparison.worse
    (line,) = [x for x in comparison_tables(record, record, comparison).splitlines() if "steady, 1 thread" in x]
    assert line.rstrip(" |").endswith("worse")
    untold = replace(start, stages=(*stages, replace(steady, rss=(None,) * 5)))
    assert not compared(record, replace(record, starts=(untold,))).worse


def test_requests_that_could_not_be_sent_are_named(record):
    fleet = record.rows[-1]
    behind = replace(fleet, tally=replace(fleet.tally, unanswered=12, unsent=10))
    shown = record_tables(replace(record, rows=(behind,)))
    assert f"10 of 100 requests of {fleet.name} could not be sent in time" in shown


def test_a_whole_path_that_is_shorter_than_its_graphs_is_said_to_be_noise(record):
    shown = record_tables(changed(record, "whole path", 0.5))
    assert "the whole path, 1 thread, 1 row, takes 0.495 ms less than its graphs one by one" in shown


def test_a_link_to_a_record_stays_a_link(record, tmp_path):
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    write_record(kept, record)
    link.symlink_to(kept)
    check_writable(link)
    write_record(link, replace(record, began="later"))
    assert link.is_symlink()
    assert read_record(kept).began == "later"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "link.json"]
