"""Compares two records of the benchmark: latency, memory, and how many requests were answered."""

from __future__ import annotations

from dataclasses import dataclass

from nmoe_edge.bench.record import Record, Row, Tally
from nmoe_edge.bench.samples import Change, Verdict, change, more_often


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory figure of a process in each round, in bytes, in both records."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The changes of everything that both records contain."""

    times: tuple[tuple[Row, Row, Change], ...]
    memory: tuple[tuple[Memory, Change], ...]
    answers: tuple[str, ...]
    """One line for each row with more refused, unanswered or degraded answers than before."""

    @property
    def has_verdict(self) -> bool:
        """Whether any figure has enough rounds for a verdict."""
        return bool(self.answers) or any(verdict != "too few rounds" for verdict in self.verdicts)

    @property
    def worse(self) -> bool:
        """Whether any figure is worse."""
        return bool(self.answers) or "worse" in self.verdicts

    @property
    def verdicts(self) -> list[Verdict]:
        return [item.verdict for _, _, item in self.times] + [item.verdict for _, item in self.memory]


def compare_records(old: Record, new: Record) -> Comparison:
    """Compare the rows of the same name."""
    after = {row.name: row for row in new.rows}
    pairs = [(row, after[row.name]) for row in old.rows if row.name in after]
    answers: list[str] = []
    for before_row, after_row in pairs:
        if before_row.tally is not None and after_row.tally is not None:
            answers += _worse_answers(before_row.name, before_row.tally, after_row.tally)
    return Comparison(
        times=tuple((a, b, change(a.parts, b.parts)) for a, b in pairs),
        memory=tuple((memory, _memory_change(memory)) for memory in _memory(old, new)),
        answers=tuple(answers),
    )


def _memory_change(memory: Memory) -> Change:
    """The change of a memory figure; each round has one sample."""
    return change([[size] for size in memory.before], [[size] for size in memory.after])


def _memory(old: Record, new: Record) -> list[Memory]:
    """The memory figures that every round of both records has."""
    before = _memory_figures(old)
    after = _memory_figures(new)
    return [Memory(name, sizes, after[name]) for name, sizes in before.items() if name in after]


def _memory_figures(record: Record) -> dict[str, tuple[int, ...]]:
    """Peak and steady resident memory for each number of threads; without figures that a round lacks."""
    figures: dict[str, tuple[int | None, ...]] = {}
    for start in record.starts:
        figures[f"peak, {start.setting}"] = start.peak
        for stage in start.stages:
            if stage.name == "steady":
                figures[f"steady, {start.setting}"] = stage.rss
    return {name: tuple(filter(None, sizes)) for name, sizes in figures.items() if all(sizes)}


def _worse_answers(name: str, old: Tally, new: Tally) -> list[str]:
    """A line for each kind of failure that happens more often than before."""
    lines = []
    for what, failed_before, of_before, failed_after, of_after in (
        ("refused", old.refused, old.asked, new.refused, new.asked),
        ("unanswered", old.unanswered, old.asked, new.unanswered, new.asked),
        ("degraded", old.degraded, old.rows, new.degraded, new.rows),
    ):
        if more_often(failed_before, of_before, failed_after, of_after):
            shares = f"{failed_before / of_before:.1%} {what} before, {failed_after / of_after:.1%} after"
            lines.append(f"WORSE: {name}: {shares}")
    return lines
