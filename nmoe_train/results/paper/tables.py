"""A table as text for a terminal, as CSV for a program, and as LaTeX (booktabs) for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from types import MappingProxyType

from nmoe_train.results.pages.formats import MISSING
from nmoe_train.results.paper.cells import PARTS, Cell, Order, Table, Value, orders
from nmoe_train.results.paper.measured import METRICS
from nmoe_train.results.paper.units import ROWS

METRIC_NAMES = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "auc": "AUC"}
_SHORT_NAMES = {"accuracy": "Acc", "macro_f1": "F1", "auc": "AUC"}
_TESTED_ON = {"own": "each device's own distribution", "iid": "balanced rows"}
_MOST_REVERSED = 3
"""Pairs of methods that the text names for each split."""


def as_text(table: Table) -> str:
    """One block for each metric, the paper's number in brackets beside ours; then where the order differs."""
    names = table.rows
    width = max(map(len, names.values()), default=0) + 2
    lines = [f"Table {table.number}: tested on {_TESTED_ON[PARTS[table.number]]}, in percent. In brackets: the paper."]
    if any(cell.seeds > 1 for cell in table.cells.values()):
        lines.append("Mean ± standard deviation of the seeds.")
    for metric in METRICS:
        lines += ["", f"{METRIC_NAMES[metric]:<{width}}" + "".join(f"{split:>21}" for split in table.partitions)]
        for row, name in names.items():
            cells = [table.cells[row, split] for split in table.partitions]
            lines.append(f"{name:<{width}}" + "".join(_text_cell(cell, metric) for cell in cells).rstrip())
    found = orders(table)
    if found:
        lines += ["", "Order of the methods by accuracy, compared with the paper's:"]
        for order in found:
            lines += _order_lines(table, order)
    return "\n".join(lines)


def _text_cell(cell: Cell, metric: str) -> str:
    """Two aligned columns: ours, and theirs in brackets."""
    theirs = f"({cell.theirs[metric]:.1f})" if metric in cell.theirs else ""
    return f"{_shown(cell.ours.get(metric), '±'):>13}{theirs:>8}"


def _shown(value: Value | None, sign: str) -> str:
    if value is None:
        return MISSING
    return f"{value.mean:.1f}" if value.spread is None else f"{value.mean:.1f} {sign} {value.spread:.1f}"


def _order_lines(table: Table, order: Order) -> list[str]:
    undecided = f", {order.close} within the spread of the seeds" if order.close else ""
    lines = [f"  {order.partition:<16}{len(order.reversed)} of {order.pairs} pairs are the other way round{undecided}"]
    for better, worse in order.reversed[:_MOST_REVERSED]:
        lines.append(f"    {_reversed_pair(table, order.partition, better, worse)}")
    more = len(order.reversed) - _MOST_REVERSED
    return [*lines, f"    and {more} more"] if more > 0 else lines


def _reversed_pair(table: Table, partition: str, better: str, worse: str) -> str:
    first = table.cells[better, partition]
    second = table.cells[worse, partition]
    ours = f"{first.ours['accuracy'].mean:.1f} > {second.ours['accuracy'].mean:.1f}"
    theirs = f"{first.theirs['accuracy']:.1f} < {second.theirs['accuracy']:.1f}"
    return f"{ROWS[better]} over {ROWS[worse]} ({ours}; paper {theirs})"


def as_csv(table: Table) -> str:
    """One line for each method, split and metric that has a number, ours or theirs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "method", "partition", "metric", "mean", "std", "seeds", "paper"])
    for row, name in table.rows.items():
        for partition in table.partitions:
            cell = table.cells[row, partition]
            for metric in METRICS:
                ours = cell.ours.get(metric)
                if ours is not None or metric in cell.theirs:
                    mean = "" if ours is None else f"{ours.mean:.3f}"
                    spread = "" if ours is None or ours.spread is None else f"{ours.spread:.3f}"
                    theirs = cell.theirs.get(metric, "")
                    writer.writerow([table.number, name, partition, metric, mean, spread, cell.seeds, theirs])
    return out.getvalue()


def as_latex(table: Table) -> str:
    """A booktabs tabular: two lines for each method, ours and the paper's."""
    splits = table.partitions
    columns = len(METRICS)
    head = " & ".join(rf"\multicolumn{{{columns}}}{{c}}{{{_latex_split(split)}}}" for split in splits)
    rules = " ".join(rf"\cmidrule(lr){{{2 + columns * i}-{1 + columns * (i + 1)}}}" for i in range(len(splits)))
    metrics = " & ".join(_SHORT_NAMES[metric] for _ in splits for metric in METRICS)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * columns * len(splits)}}}",
        r"\toprule",
        rf"Method & {head} \\",
        rules,
        rf" & {metrics} \\",
        r"\midrule",
    ]
    for row, name in table.rows.items():
        cells = [table.cells[row, split] for split in splits]
        lines.append(rf"{_escaped(name)} & {_latex_cells(cells, _latex_ours)} \\")
        if any(cell.theirs for cell in cells):
            lines.append(rf"\quad \emph{{paper}} & {_latex_cells(cells, _latex_theirs)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_cells(cells: Sequence[Cell], shown: Callable[[Cell, str], str]) -> str:
    return " & ".join(shown(cell, metric) for cell in cells for metric in METRICS)


def _latex_ours(cell: Cell, metric: str) -> str:
    value = cell.ours.get(metric)
    if value is None:
        return "--"
    return f"{value.mean:.1f}" if value.spread is None else rf"${value.mean:.1f}_{{\pm{value.spread:.1f}}}$"


def _latex_theirs(cell: Cell, metric: str) -> str:
    return rf"\emph{{{cell.theirs[metric]:.2f}}}" if metric in cell.theirs else "--"


def _latex_split(partition: str) -> str:
    kind, _, number = partition.partition(":")
    names = {"iid": "IID", "noniid": "Non-IID", "dirichlet": "Dirichlet", "classes": "Classes"}
    return f"{names.get(kind, _escaped(kind))} ({_escaped(number)})" if number else names.get(kind, _escaped(kind))


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "&%$#_{}" else letter for letter in text)


FORMATS = MappingProxyType({"text": as_text, "csv": as_csv, "latex": as_latex})
SUFFIXES = MappingProxyType({"text": "txt", "csv": "csv", "latex": "tex"})
