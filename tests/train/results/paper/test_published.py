from __future__ import annotations

import pytest

from nmoe_train.results.paper.published import PUBLISHED
from nmoe_train.results.paper.units import ROWS


def test_every_number_of_both_tables_is_there():
    assert {number: len(cells) for number, cells in PUBLISHED.items()} == {1: 33, 2: 24}
    assert {row for cells in PUBLISHED.values() for row, _ in cells} <= set(ROWS)
    assert ("centralised", "noniid:0.5") not in PUBLISHED[1]
    assert not any(partition == "iid" for _, partition in PUBLISHED[2])
    assert all(0 <= value <= 100 for cells in PUBLISHED.values() for cell in cells.values() for value in cell)


@pytest.mark.parametrize(
    ("number", "row", "partition", "cell"),
    [
        (1, "centralised", "iid", (90.37, 90.25, 97.7)),
        (1, "fedce-rollgate", "noniid:0.2", (20.86, 8.41, 59.28)),
        (1, "fedsc-fedgate", "noniid:0.3", (60.03, 43.67, 88.43)),
        (2, "fedavg", "noniid:0.3", (14.4, 7.62, 70.74)),
        (2, "fedsc-fedgate", "noniid:0.2", (50.58, 49.54, 80.56)),
    ],
)
def test_a_number_stands_in_its_place(number, row, partition, cell):
    assert PUBLISHED[number][row, partition] == cell


def test_table_1_shows_a_local_classifier_that_always_answers_the_own_class():
    for tau in (0.5, 0.3, 0.2):
        accuracy, macro_f1, auc = PUBLISHED[1]["local", f"noniid:{tau}"]
        share = 1 / (1 + tau)
        assert accuracy == pytest.approx(100 * share, abs=0.01)
        assert macro_f1 == pytest.approx(10 * 2 * share / (1 + share), abs=0.01)
        assert auc == 50
