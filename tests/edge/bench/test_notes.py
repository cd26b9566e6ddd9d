from __future__ import annotations

from dataclasses import replace

from edge.bench.records import CALM, cells, changed

from nmoe_edge.bench.record import Peers
from nmoe_edge.bench.tables import record_tables


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


def test_a_note_counts_requests_that_could_not_be_sent(record):
    fleet = record.rows[-1]
    behind = replace(fleet, tally=replace(fleet.tally, unanswered=12, unsent=10))
    shown = record_tables(replace(record, rows=(behind,)))
    assert f"10 of 100 requests of {fleet.name} could not be sent in time" in shown


def test_a_note_says_that_a_whole_path_faster_than_its_graphs_is_noise(record):
    shown = record_tables(changed(record, "whole path", 0.5))
    assert "the whole path, 1 thread, 1 row, takes 0.495 ms less than the sum of its graphs" in shown
