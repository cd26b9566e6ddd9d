"""The record of a benchmark, written as JSON and read back: samples, and the conditions they were taken under.

measure.py makes records, tables.py shows them. Reading is strict: an unknown key, a field of the wrong type or another
schema is an error that names it. Field names are the keys of the file, so that older records stay readable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nmoe_edge.bench.board import Machine, Moment
from nmoe_edge.bench.samples import MAX_ROUNDS
from nmoe_edge.common.files import replace_file
from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_edge.common.text import counted
from nmoe_edge.errors import BenchError

SCHEMA = 1
_MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tally:
    """Outcomes of the requests to a device."""

    asked: int
    refused: int
    unanswered: int
    unsent: int
    """Unanswered requests that were never sent: the benchmark or the connection was over a second behind schedule."""
    rows: int
    """Answered rows."""
    at_home: int
    """Rows answered locally, by the device's own expert, as the gate or --local-first decided."""
    degraded: int
    """Rows answered without an expert that the gate chose."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured step or request, a row of the tables."""

    scenario: Literal["start", "local", "peer", "fleet"]
    what: str
    setting: str
    rows: int
    """Rows of input in one call."""
    parts: tuple[tuple[int, ...], ...]
    """The samples of each round, in nanoseconds."""
    settled: bool = True
    """Whether the warm-up settled in every round."""
    mean_w: float | None = None
    """Mean power of the board, in watts."""
    sent_bytes: float | None = None
    """Header and payload, per row of input."""
    received_bytes: float | None = None
    tally: Tally | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_ROUNDS or not all(self.parts):
            raise ValueError(f"{self.name}: expected 1 to {MAX_ROUNDS} rounds, each with samples")
        if not all(0 < sample < 2**63 for sample in self.samples):
            raise ValueError(f"{self.name}: a sample must be a number of nanoseconds above 0")

    @property
    def name(self) -> str:
        """Identifies the row: rows of two records are compared if their names are equal."""
        return f"{self.scenario}: {self.what}, {self.setting}, {counted(self.rows, 'row')}"

    @property
    def samples(self) -> list[int]:
        """The samples of all rounds."""
        return [sample for part in self.parts for sample in part]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage in the life of a process, from its start to its steady state."""

    name: str
    at_ns: tuple[int, ...]
    """When the stage was over, in nanoseconds since the process started, in each round."""
    rss: tuple[int | None, ...]
    """Resident memory at that time, in bytes, in each round."""


@dataclass(frozen=True, slots=True)
class Start:
    """The start of a process and its memory, for one number of threads."""

    setting: str
    stages: tuple[Stage, ...]
    pss: tuple[int | None, ...]
    peak: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """The bundle that was measured."""

    device: str
    digest: str
    precision: str
    latents: str
    files: Mapping[str, int]
    """File name -> bytes on disk."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Peers of the device that the fleet was asked through."""

    known: int
    before: int
    """Peers that were alive before the first request."""
    after: int | None = None
    """Peers that were alive after the last request; None if the benchmark stopped early."""


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that one benchmark measured."""

    schema: int
    began: str
    """Start of the benchmark, UTC."""
    nmoe: str
    python: str
    runtime: str
    """Version of onnxruntime."""
    provider: str
    machine: Machine
    before: Moment
    after: Moment
    bundle: Subject
    duration_s: float
    """Seconds of measuring for each scenario, all rounds together."""
    starts: tuple[Start, ...]
    rows: tuple[Row, ...]
    peers: Peers | None = None
    stopped: str | None = None
    """Where the benchmark was when a signal or an error stopped it; the record holds the complete rounds."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"the row {repeated!r} appears twice")


def read_record(path: Path) -> Record:
    """Read a record; BenchError if the file is missing or not a valid record."""
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        plain = parse_json(data)
        schema = plain.get("schema") if isinstance(plain, dict) else None
        # Checked before the keys, because another schema has other keys.
        if schema is not None and schema != SCHEMA:
            raise ValueError(f"schema {schema!r:.40} is unknown; this nmoe reads schema {SCHEMA}")
        return from_plain(Record, plain)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}; write a record with nmoe-edge bench --json") from error
    except ValueError as error:
        raise BenchError(f"{path}: not a record of nmoe-edge bench: {error}") from error


def check_writable(path: Path) -> None:
    """Raise BenchError if `write_record` could not write to `path`, or would replace a file that is not a record.

    Called before the minutes of measuring.
    """
    folder = path.resolve().parent
    if os.path.isdir(path):
        raise BenchError(f"{path} is a folder; choose another file")
    if not os.path.isdir(folder):
        raise BenchError(f"{path}: its folder does not exist; choose another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BenchError(f"{path}: its folder is not writable; choose another file")
    is_empty_file = os.path.isfile(path) and path.stat().st_size == 0
    if os.path.lexists(path) and not is_empty_file:
        try:
            read_record(path)
        except BenchError as error:
            raise BenchError(f"{path} is not a record and is not replaced; choose another file") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record, replacing the file atomically."""
    try:
        replace_file(path, json.dumps(to_plain(record), allow_nan=False))
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}") from error
