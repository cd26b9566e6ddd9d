"""What became of one record's figures in another: time, memory, and what was answered."""

from __future__ import annotations

from dataclasses import dataclass

from nmoe_edge.bench.record import Record, Row
from nmoe_edge.bench.samples import Change, change, more_often


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process had at one stage, in a number of rounds, before and after."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that two records have in common."""

    times: tuple[tuple[Row, Row, Change], ...]
    memory: tuple[tuple[Memory, Change], ...]
    answers: tuple[str, ...]
    """Why answers over the wire are worse, a line each."""

    @property
    def told(self) -> bool:
        """Whether anything has a verdict."""
        return bool(self.answers) or any(it.verdict != "too few rounds" for it in self._changes)

    @property
    def worse(self) -> bool:
        """Whether anything is."""
        return bool(self.answers) or any(it.verdict == "worse" for it in self._changes)

    @property
    def _changes(self) -> list[Change]:
        return [it for _, _, it in self.times] + [it for _, it in self.memory]


def compared(old: Record, new: Record) -> Comparison:
    """Row by row, by their names."""
    after = {row.name: row for row in new.rows}
    pairs = [(row, after[row.name]) for row in old.rows if row.name in after]
    return Comparison(
        tuple((a, b, change(a.parts, b.parts)) for a, b in pairs),
        tuple((it, change([[b] for b in it.before], [[a] for a in it.after])) for it in _memory(old, new)),
        tuple(why for a, b in pairs for why in _answers(a, b)),
    )


def _memory(old: Record, new: Record) -> list[Memory]:
    """Of each number of threads what is resident in the steady state, and the most that ever was."""

    def told(record: Record) -> dict[str, tuple[int | None, ...]]:
        found = {}
        for start in record.starts:
            found[f"peak, {start.setting}"] = start.peak
            found.update({f"{s.name}, {start.setting}": s.rss for s in start.stages if s.name == "steady"})
        return found

    before, after = told(old), told(new)
    return [
        Memory(name, tuple(filter(None, before[name])), tuple(filter(None, after[name])))
        for name in before
        if name in after and all(before[name]) and all(after[name])
    ]


def _answers(before: Row, after: Row) -> list[str]:
    old, new = before.tally, after.tally
    if old is None or new is None:
        return []
    found = []
    for what, a, of_a, b, of_b in (
        ("refused", old.refused, old.asked, new.refused, new.asked),
        ("unanswered", old.unanswered, old.asked, new.unanswered, new.asked),
        ("degraded", old.degraded, old.rows, new.degraded, new.rows),
    ):
        if more_often(a, of_a, b, of_b):
            found.append(f"WORSE: {before.name}: {a / of_a:.1%} {what} before, {b / of_b:.1%} after")
    return found
