from __future__ import annotations

from dataclasses import replace

from edge.bench.records import ALIKE, CALM, cells, changed

from nmoe_edge.bench.compare import compare_records
from nmoe_edge.bench.tables import comparison_tables, record_tables


def shown_beside(old, new):
    return comparison_tables(old, new, compare_records(old, new))


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
        comparison = compare_records(record, other)
        assert comparison.worse
        assert f"WORSE: {fleet.name}: " in comparison_tables(record, other, comparison)
        assert f"% {what} before, 6" in comparison_tables(record, other, comparison)
        assert not compare_records(other, record).worse


def test_more_memory_is_worse(record):
    (start,) = record.starts
    (*stages, steady) = start.stages
    larger = replace(start, stages=(*stages, replace(steady, rss=(70 * 2**20,) * 5)))
    comparison = compare_records(record, replace(record, starts=(larger,)))
    assert comparison.worse
    assert cells(comparison_tables(record, record, comparison), "| steady, 1 thread")[-1] == "worse"
    unknown = replace(start, stages=(*stages, replace(steady, rss=(None,) * 5)))
    assert not compare_records(record, replace(record, starts=(unknown,))).worse
