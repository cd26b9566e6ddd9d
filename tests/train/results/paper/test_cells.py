from __future__ import annotations

import pytest

from nmoe_train.results.paper.cells import figures_of, orders, table_of
from nmoe_train.results.paper.units import ROWS, table_units


def figures(accuracy, auc=0.5):
    part = {"accuracy": accuracy, "macro_f1": 0.25, "auc": auc}
    return {"own": part, "iid": {**part, "accuracy": accuracy / 2}}


def test_a_cell_is_the_mean_and_the_standard_deviation_of_its_seeds(split):
    done = {
        "noniid-0.5-fedce-fedgate-0": figures(0.5, None),
        "noniid-0.5-fedce-fedgate-1": figures(0.7, None),
        "noniid-0.5-fedce-fedgate-2": figures(0.9),
    }
    assert len(figures_of(done, "fedce-fedgate", split, "own", range(2))) == 2
    cell = table_of(1, done, [split], 3).cells["fedce-fedgate", split]
    assert (cell.ours["accuracy"].mean, cell.ours["accuracy"].spread) == (pytest.approx(70), pytest.approx(20))
    assert (cell.ours["auc"].mean, cell.ours["auc"].spread) == (50, None)
    assert cell.theirs == {"accuracy": 73.25, "macro_f1": 64.26, "auc": 90.20}
    assert table_of(2, done, [split], 3).cells["fedce-fedgate", split].ours["accuracy"].mean == pytest.approx(35)


def test_a_table_without_any_figures_shows_the_paper(split):
    table = table_of(2, {}, [split, "classes:2"], 1)
    assert "fedsc-rangate" in table.rows
    assert "centralised" not in table.rows
    assert table.cells["fedsc-rangate", "classes:2"].theirs == {}
    assert orders(table) == []


def test_the_order_of_methods_is_compared_with_the_papers(split):
    done = {
        "noniid-0.5-fedce-fedgate-0": figures(0.5),  # 73.25 in the paper
        "noniid-0.5-fedce-rollgate-0": figures(0.8),  # 61.92
        "noniid-0.5-fedce-rangate-0": figures(0.6),  # 64.92
        "noniid-0.5-fedsc-rangate-0": figures(0.1),  # 56.31
    }
    (order,) = orders(table_of(1, done, [split], 1))
    assert (order.partition, order.pairs, order.close) == (split, 6, 0)
    assert order.reversed == [
        ("fedce-rollgate", "fedce-fedgate"),
        ("fedce-rollgate", "fedce-rangate"),
        ("fedce-rangate", "fedce-fedgate"),
    ]


def test_pairs_within_the_spread_of_the_seeds_are_not_called_reversed(split):
    done = {f"noniid-0.5-fedce-fedgate-{seed}": figures(0.5 + 0.1 * seed) for seed in range(3)}
    done |= {f"noniid-0.5-fedce-rangate-{seed}": figures(0.52 + 0.1 * seed) for seed in range(3)}
    (order,) = orders(table_of(1, done, [split], 3))
    assert (order.reversed, order.close) == ([], 1)


def test_every_row_of_a_table_has_its_unit(made):
    names = {unit.name for unit in table_units(["noniid:0.5"], 1, rivals=True)}
    for row in ROWS:
        assert figures_of(made.done, row, "noniid:0.5", "iid", [0]), row
    assert names <= set(made.done)
