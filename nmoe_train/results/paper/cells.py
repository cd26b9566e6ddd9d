"""Ours beside theirs: the mean of the seeds for each cell of a table, and where the order of methods differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from nmoe_train.results.paper.folder import Done
from nmoe_train.results.paper.measured import METRICS
from nmoe_train.results.paper.published import PUBLISHED
from nmoe_train.results.paper.units import BASELINES, ROWS, Unit

PARTS = {1: "own", 2: "iid"}
"""The test set of each table."""


@dataclass(frozen=True, slots=True)
class Value:
    """One number of ours, in percent."""

    mean: float
    spread: float | None
    """Standard deviation of the seeds (n-1 in the denominator); None for a single seed"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one split: ours and theirs, by metric. Missing numbers are left out."""

    ours: Mapping[str, Value]
    theirs: Mapping[str, float]
    seeds: int
    """Seeds behind `ours`"""


@dataclass(frozen=True, slots=True)
class Table:
    """Table I or II."""

    number: int
    partitions: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]
    """{(row, partition): cell}"""

    @property
    def rows(self) -> dict[str, str]:
        """Rows that have any number, ours or theirs."""
        found = {}
        for row, name in ROWS.items():
            cells = [self.cells[row, partition] for partition in self.partitions]
            if any(cell.ours or cell.theirs for cell in cells):
                found[row] = name
        return found


def table_of(number: int, done: Done, partitions: Sequence[str], seeds: int) -> Table:
    """Table 1 (each client's own distribution) or 2 (balanced rows) as far as it is done."""
    cells = {}
    for row in ROWS:
        for partition in partitions:
            found = figures_of(done, row, partition, PARTS[number], range(seeds))
            published = PUBLISHED[number].get((row, partition), ())
            theirs = dict(zip(METRICS, published, strict=True)) if published else {}
            cells[row, partition] = Cell(_means(found), theirs, len(found))
    return Table(number, partitions, cells)


def figures_of(done: Done, row: str, partition: str, part: str, seeds: Iterable[int]) -> list[Mapping[str, Any]]:
    """The figures of one cell that are there: at most one per seed."""
    extractor, _, gate = row.partition("-")
    found = []
    for seed in seeds:
        if gate:
            figures = done.get(Unit(partition, extractor, gate, seed).name)
        else:
            (kind,) = [kind for kind, methods in BASELINES.items() if row in methods]
            figures = done.get(Unit(partition, "fedce", kind, seed).name, {}).get(row)
        if figures:
            found.append(figures[part])
    return found


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    means = {}
    for metric in METRICS:
        values = [figures[metric] for figures in found if figures[metric] is not None]
        if values:
            means[metric] = value_of(values)
    return means


def value_of(shares: Sequence[float]) -> Value:
    """Mean and standard deviation of shares in 0..1, in percent."""
    spread = 100 * float(np.std(shares, ddof=1)) if len(shares) > 1 else None
    return Value(100 * float(np.mean(shares)), spread)


@dataclass(frozen=True, slots=True)
class Order:
    """How the methods of one split rank by accuracy, ours against theirs."""

    partition: str
    pairs: int
    """Pairs of methods that can be compared: both have a number of ours and one of theirs"""
    reversed: Sequence[tuple[str, str]]
    """(better here, better in the paper), the clearest first"""
    close: int
    """Pairs that are not counted, because ours differ by less than the spread of the seeds"""


def orders(table: Table) -> list[Order]:
    """One entry for each split with at least two methods to compare."""
    found = []
    for partition in table.partitions:
        column = {row: table.cells[row, partition] for row in table.rows}
        comparable = [row for row, cell in column.items() if "accuracy" in cell.ours and "accuracy" in cell.theirs]
        reversed_pairs = []
        close = 0
        for first, second in combinations(comparable, 2):
            gain = column[first].ours["accuracy"].mean - column[second].ours["accuracy"].mean
            theirs = column[first].theirs["accuracy"] - column[second].theirs["accuracy"]
            if abs(gain) <= _spread(column[first], column[second]):
                close += 1
            elif gain * theirs < 0:
                reversed_pairs.append((abs(gain), (first, second) if gain > 0 else (second, first)))
        if len(comparable) > 1:
            pairs = len(comparable) * (len(comparable) - 1) // 2
            ranked = [pair for _, pair in sorted(reversed_pairs, reverse=True)]
            found.append(Order(partition, pairs, ranked, close))
    return found


def _spread(first: Cell, second: Cell) -> float:
    """The standard deviation of the difference of two accuracies; 0 for single seeds."""
    return math.hypot(first.ours["accuracy"].spread or 0.0, second.ours["accuracy"].spread or 0.0)
