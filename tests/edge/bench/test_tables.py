from __future__ import annotations

from dataclasses import replace

import pytest

from nmoe_edge.bench.board import Moment
from nmoe_edge.bench.record import Row
from nmoe_edge.bench.tables import record_tables


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
