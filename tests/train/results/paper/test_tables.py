from __future__ import annotations

import csv
import io

import pytest

from nmoe_train.results.paper.cells import table_of
from nmoe_train.results.paper.tables import as_csv, as_latex, as_text


@pytest.fixture
def table(made, split):
    return table_of(1, made.done, [split, "classes:2"], 1)


def test_text_shows_ours_and_in_brackets_the_papers(made, table):
    lines = as_text(table).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Macro F1"))
    row = next(line for line in lines[start:] if line.startswith("FedSC + RollGate"))
    ours = made.done["noniid-0.5-fedsc-rollgate-0"]["own"]["macro_f1"]
    assert row.removeprefix("FedSC + RollGate").split() == [f"{100 * ours:.1f}", "(48.4)", "–"]
    assert "pairs are the other way round" in as_text(table)
    assert "±" not in as_text(table)


def test_text_shows_the_spread_of_several_seeds(split):
    part = {"accuracy": 0.5, "macro_f1": 0.5, "auc": 0.5}
    done = {f"noniid-0.5-fedce-rangate-{i}": {"own": {**part, "accuracy": 0.4 + 0.1 * i}} for i in range(2)}
    text = as_text(table_of(1, done, [split], 2))
    assert "45.0 ± 7.1  (64.9)" in text
    assert "Mean ± standard deviation of the seeds" in text
    assert r"$45.0_{\pm7.1}$" in as_latex(table_of(1, done, [split], 2))


def test_csv_has_a_line_for_each_number(made, table, split):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len({(row["method"], row["partition"], row["metric"]) for row in rows}) == len(rows)
    (cell,) = [row for row in rows if (row["method"], row["metric"]) == ("FedCE + FedGate", "auc")]
    ours = made.done["noniid-0.5-fedce-fedgate-0"]["own"]["auc"]
    assert cell == {
        "table": "1",
        "method": "FedCE + FedGate",
        "partition": split,
        "metric": "auc",
        "mean": f"{100 * ours:.3f}",
        "std": "",
        "seeds": "1",
        "paper": "90.2",
    }


def test_latex_is_a_booktabs_table_with_as_many_cells_in_every_row(table):
    lines = as_latex(table).splitlines()
    assert lines[1] == r"\begin{tabular}{lrrrrrr}"
    body = [line for line in lines if line.endswith(r"\\")]
    widths = [sum(int(part[:1]) for part in line.split(r"\multicolumn{")[1:]) or line.count("&") for line in body]
    assert set(widths) == {6}
    assert [line for line in lines if line.startswith("\\")][-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert r"\multicolumn{3}{c}{Non-IID (0.5)} & \multicolumn{3}{c}{Classes (2)}" in lines[3]
    assert any(line.startswith(r"\quad \emph{paper} & \emph{66.66} & \emph{8.00} & \emph{50.00}") for line in lines)
