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


def cells(shown, start):
    """The cells of the only line of a table that starts so."""
    (line,) = [line for line in shown.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.split("|")[1:-1]]


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
    """The record with the samples of one step multiplied by a factor."""

    def slower(part):
        return tuple(int(ns * by) for ns in part)

    def row_with_change(row):
        return replace(row, parts=tuple(map(slower, row.parts))) if row.what == name else row

    return replace(record, rows=tuple(map(row_with_change, record.rows)))


def shown_beside(old, new):
    return comparison_tables(old, new, compared(old, new))


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


def test_the_tables_show_figures_with_their_conditions_and_dashes_for_unknown_values(record):
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
    assert "Not reported by this board: kernel, its peak." in lines
    assert lines[2] == (
        "p50 of one row: 1.010 ms locally, the whole path (1 thread);"
        " 1.000 ms to a peer's expert and back (int8);"
        " 1.000 ms through the fleet (closed loop, 1 client)."
    )
    assert lines[4] == (
        "Models ready 0.30 s after the start of the process; 62.0 MiB in the steady state, without sockets (1 thread)."
    )
    captions = [line for line in lines if line.startswith(("Latency", "Over the wire"))]
    assert len(captions) == 2
    assert all("Arm Cortex-A76" in line and "performance" in line and "0123" in line for line in captions)


def test_an_unknown_value_has_no_line_or_column_and_is_named_once(record):
    nothing = Moment(None, None, None, None, None, None, None)
    rows = tuple(replace(row, parts=row.parts[:1], mean_w=None) for row in record.rows)
    shown = record_tables(replace(record, before=nothing, after=replace(nothing, load=1.0), rows=rows))
    (unknown,) = [line for line in shown.splitlines() if line.startswith("Not reported")]
    for what in ("kernel", "governor", "MHz", "°C", "throttled", "power from", "power drawn"):
        assert what in unknown
        assert shown.count(what) == 1
    assert "| load average" in shown  # one of its two values is known
    assert "mJ" not in shown
    assert "spread of rounds" not in shown  # there is only one round


@pytest.mark.parametrize(
    ("ns", "shown"), [(6_130, "0.00613"), (99, "0.0000990"), (48_951, "0.0490"), (605_000, "0.605"), (99_999, "0.1000")]
)
def test_times_have_three_significant_digits(record, ns, shown):
    rows = (Row("local", "gate", "1 thread", 1, ((ns,),)),)
    assert f"| {shown} " in record_tables(replace(record, rows=rows))


def test_a_note_says_if_every_row_or_no_row_was_answered_locally(record):
    fleet = record.rows[-1]
    name = "row of fleet: closed loop, 1 client, attic, 1 row was answered locally"
    for at_home, text in ((97, f"every {name}"), (0, f"no {name}")):
        rows = (replace(fleet, tally=replace(fleet.tally, at_home=at_home)),)
        assert text in record_tables(replace(record, rows=rows))
    assert "no row of" not in record_tables(record)


def test_a_note_says_if_peers_were_not_alive(record):
    shown = record_tables(replace(record, peers=Peers(3, 3, 2)))
    assert "3 of 3 peers were alive before, 2 after" in shown
    assert cells(shown, "| peers alive")[1:] == ["3 of 3", "2 of 3"]
    assert "2 of 3 peers were alive before, – after" in record_tables(replace(record, peers=Peers(3, 2)))
    assert "were alive" not in record_tables(replace(record, peers=Peers(3, 3, 3)))
    assert "were alive" not in record_tables(replace(record, peers=Peers(0, 0, 0)))


def test_a_note_says_where_a_benchmark_was_stopped(record):
    assert "the benchmark was stopped in round 2 of 5: the graphs" in record_tables(
        replace(record, stopped="stopped in round 2 of 5: the graphs")
    )


def test_a_note_says_how_much_of_the_whole_path_is_outside_the_graphs(record):
    assert "outside the graphs" not in record_tables(record)
    assert "the whole path, 1 thread, 1 row, spends 0.515 ms, 34%, outside the graphs" in record_tables(
        changed(record, "whole path", 1.5)
    )


def test_notes_on_doubtful_figures_say_what_to_do(record):
    assert "performance, or" not in record_tables(record)
    assert "load average was 3.00" in record_tables(replace(record, before=replace(CALM, load=3.0)))
    assert "throttled: no before, 1 times" in record_tables(replace(record, after=replace(CALM, throttled="1 times")))
    shaken = (*record.rows[:1], replace(record.rows[1], parts=((100,), (150,)), settled=False))
    shown = record_tables(replace(record, rows=shaken))
    assert "the rounds differ by more than 10% for 1 of 1 rows, most for local: extractor, 1 thread" in shown
    assert "did not settle within 2 s for 1 of 1 rows, such as local: extractor" in shown
    assert "longer --duration" in shown


def test_a_comparison_shows_the_change_of_every_row(record):
    shown = shown_beside(record, changed(record, "gate", 1.5))
    assert "WARNING" not in shown
    assert cells(shown, "| local: gate")[-2:] == ["1.500 to 1.500", "worse"]
    assert shown.count("| same ") == len(record.rows) - 1 + 1  # memory


def test_another_bundle_or_machine_gives_a_warning_without_control_characters(record):
    other = replace(
        record,
        bundle=replace(record.bundle, digest="\x1b[2J"),
        machine=replace(record.machine, board="Pi\n| 4 |", cores=None),
        before=replace(CALM, governor="powersave"),
    )
    shown = shown_beside(record, other)
    for what in ("bundle", "machine", "governor"):
        assert f"WARNING: the second record has another {what}: " in shown
    assert "\x1b" not in shown
    assert "\x1b" not in record_tables(other)


def test_rows_of_only_one_record_are_named(record):
    fewer = replace(record, rows=record.rows[1:])
    assert "only in the first record: start: first answer" in shown_beside(record, fewer)
    shown = shown_beside(record, replace(record, rows=()))
    assert shown.endswith("local: gate, 1 thread, 1 row; and 4 more")


def test_a_comparison_has_the_notes_on_the_rows_it_shows(record):
    noisy = replace(record.rows[-1], parts=((1_000_000,), (2_000_000,), *ALIKE[:3]), settled=False)
    other = replace(record, rows=(*record.rows[:-1], noisy))
    shown = shown_beside(record, other)
    assert "1 of 8 rows say cannot tell" in shown
    assert "in the second record, the warm-up did not settle" in shown
    assert "percentile" not in shown
    calm = replace(record, rows=record.rows[:-1])
    assert "did not settle" not in shown_beside(calm, other)  # the noisy row is not shown


def test_a_fleet_that_answers_fewer_requests_is_worse_whatever_its_latency(record):
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
    assert cells(comparison_tables(record, record, comparison), "| steady, 1 thread")[-1] == "worse"
    unknown = replace(start, stages=(*stages, replace(steady, rss=(None,) * 5)))
    assert not compared(record, replace(record, starts=(unknown,))).worse


def test_a_note_counts_requests_that_could_not_be_sent(record):
    fleet = record.rows[-1]
    behind = replace(fleet, tally=replace(fleet.tally, unanswered=12, unsent=10))
    shown = record_tables(replace(record, rows=(behind,)))
    assert f"10 of 100 requests of {fleet.name} could not be sent in time" in shown


def test_a_note_says_that_a_whole_path_faster_than_its_graphs_is_noise(record):
    shown = record_tables(changed(record, "whole path", 0.5))
    assert "the whole path, 1 thread, 1 row, takes 0.495 ms less than the sum of its graphs" in shown


def test_a_symbolic_link_to_a_record_stays_a_link(record, tmp_path):
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    write_record(kept, record)
    link.symlink_to(kept)
    check_writable(link)
    write_record(link, replace(record, began="later"))
    assert link.is_symlink()
    assert read_record(kept).began == "later"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "link.json"]
