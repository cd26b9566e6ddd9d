"""What a benchmark found: samples and the conditions that they were taken under, as JSON and back.

Knows neither how it was measured nor how it is shown. Reading is strict: a field of another type, an unknown key or
another schema is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nmoe_edge.bench.board import Machine, Moment
from nmoe_edge.bench.samples import MOST_ROUNDS
from nmoe_edge.common.files import replace_file
from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_edge.errors import BenchError

SCHEMA = 1
MOST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of requests to a device."""

    asked: int
    refused: int
    unanswered: int
    unsent: int
    """Of these, because the benchmark itself, or the way there, was over a second behind."""
    rows: int
    """Answered."""
    at_home: int
    """Of these, by the device's own expert, as the gate or local first wanted."""
    degraded: int
    """Of these, otherwise than the gate wanted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured."""

    scenario: Literal["start", "local", "peer", "fleet"]
    what: str
    setting: str
    rows: int
    """Together in one call."""
    parts: tuple[tuple[int, ...], ...]
    """Nanoseconds, a part for each round."""
    settled: bool = True
    """Whether the warm-up of every round was."""
    mean_w: float | None = None
    sent_bytes: float | None = None
    """For a row, header and payload."""
    received_bytes: float | None = None
    tally: Tally | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MOST_ROUNDS or not all(self.parts):
            raise ValueError(f"{self.name}: 1 to {MOST_ROUNDS} rounds of samples are due")
        if not all(0 < sample < 2**63 for part in self.parts for sample in part):
            raise ValueError(f"{self.name}: a sample is a number of nanoseconds over 0")

    @property
    def name(self) -> str:
        """What a row of another record must be called to be compared with it."""
        return f"{self.scenario}: {self.what}, {self.setting}, {self.rows} row{'s' if self.rows > 1 else ''}"

    @property
    def samples(self) -> list[int]:
        """Of all rounds."""
        return [sample for part in self.parts for sample in part]


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of a process's beginning."""

    name: str
    at_ns: tuple[int, ...]
    """Since the process began, a number for each round."""
    rss: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """How a process begins, and what it takes."""

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
    """Bytes on the disk."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Of the device that a fleet was asked through."""

    known: int
    before: int
    """Alive when it was first asked."""
    after: int | None = None
    """When it was last; None where it came to no end."""


@dataclass(frozen=True, slots=True)
class Record:
    """All of it."""

    schema: int
    began: str
    """UTC."""
    nmoe: str
    python: str
    runtime: str
    """onnxruntime's version."""
    provider: str
    machine: Machine
    before: Moment
    after: Moment
    bundle: Subject
    duration_s: float
    """Of each scenario."""
    starts: tuple[Start, ...]
    rows: tuple[Row, ...]
    peers: Peers | None = None
    stopped: str | None = None
    """Where it was when it was stopped, or could not go on; what was whole by then is here."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands in it twice")


def read_record(path: Path) -> Record:
    """Read a record; BenchError says what is wrong with it."""
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ValueError("not a plain file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        plain = parse_json(data)
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if schema is not None and schema != SCHEMA:  # before its keys are looked at: another schema has others
            raise ValueError(f"schema {schema!r:.40} is unknown: this nmoe reads schema {SCHEMA}")
        return from_plain(Record, plain)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}; nmoe-edge bench BUNDLE --json writes one") from error
    except ValueError as error:
        raise BenchError(f"{path}: no record of nmoe-edge bench: {error}") from error


def check_writable(path: Path) -> None:
    """Refuse a place that `write_record` could not or should not write to: worth asking before minutes of work."""
    folder = path.resolve().parent
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise BenchError(f"{path}: cannot be written there; choose another place")
    if os.path.lexists(path) and not (os.path.isfile(path) and path.stat().st_size == 0):
        try:
            read_record(path)
        except BenchError as error:
            raise BenchError(f"{path} is no record that could be replaced; choose another name") from error


def write_record(path: Path, record: Record) -> None:
    """Replace a record: a reader sees the old one or the new one."""
    try:
        replace_file(path, json.dumps(to_plain(record), allow_nan=False))
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}") from error
