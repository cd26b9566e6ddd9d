"""A made-up record of the benchmark, for the tests of records, tables, notes and comparisons."""

from __future__ import annotations

from dataclasses import replace

from nmoe_edge.bench.board import Machine, Moment
from nmoe_edge.bench.record import Record, Row, Stage, Start, Subject, Tally

CALM = Moment(0.1, "performance", 2400.0, 2400.0, 50.0, "no", "mains")
ALIKE = ((1_000_000,) * 20,) * 5


def step(what, ns, **rest):
    return Row("local", what, "1 thread", 1, ((ns,) * 1500,) * 5, **rest)


def cells(shown, start):
    """The cells of the only line of a table that starts so."""
    (line,) = [line for line in shown.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def changed(record, name, by):
    """The record with the samples of one step multiplied by a factor."""

    def slower(part):
        return tuple(int(ns * by) for ns in part)

    def row_with_change(row):
        return replace(row, parts=tuple(map(slower, row.parts))) if row.what == name else row

    return replace(record, rows=tuple(map(row_with_change, record.rows)))


def made_up_record() -> Record:
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
