"""The numbers that the paper prints, in percent."""

from __future__ import annotations

from dataclasses import dataclass

Cell = tuple[float, float, float]
"""Accuracy, macro F1 and AUC"""

SPLITS = ("iid", "noniid:0.5", "noniid:0.3", "noniid:0.2")
_TABLE_1: dict[str, tuple[Cell, ...]] = {
    "centralised": ((90.37, 90.25, 97.7),),
    "local": ((11.08, 1.81, 48.49), (66.66, 8.00, 50.00), (76.92, 8.69, 50.00), (83.33, 9.09, 50.00)),
    "fedavg": ((67.91, 66.93, 93.53), (35.78, 32.94, 83.25), (17.35, 11.23, 70.92), (11.54, 3.98, 63.39)),
    "fedce-rangate": ((88.24, 88.19, 96.91), (64.92, 56.20, 83.40), (32.32, 20.21, 66.00), (20.04, 10.11, 57.89)),
    "fedce-rollgate": ((88.32, 88.31, 97.34), (61.92, 56.30, 80.75), (30.57, 18.93, 62.57), (20.86, 8.41, 59.28)),
    "fedce-fedgate": ((89.60, 89.51, 97.29), (73.25, 64.26, 90.20), (35.49, 24.18, 70.60), (32.95, 18.77, 69.39)),
    "fedsc-rangate": ((74.79, 74.40, 94.01), (56.31, 45.50, 82.82), (40.57, 28.43, 73.35), (14.30, 6.93, 60.02)),
    "fedsc-rollgate": ((74.87, 74.42, 93.80), (58.52, 48.41, 87.07), (41.82, 29.91, 74.68), (16.47, 7.48, 59.73)),
    "fedsc-fedgate": ((77.26, 76.88, 94.62), (67.54, 56.45, 91.02), (60.03, 43.67, 88.43), (54.03, 32.73, 81.64)),
}
_TABLE_2: dict[str, tuple[Cell, ...]] = {
    "local": ((9.77, 6.55, 50.03), (10.02, 6.34, 50.08), (10.78, 2.77, 49.02)),
    "fedavg": ((28.93, 22.43, 83.14), (14.4, 7.62, 70.74), (10.52, 7.04, 53.65)),
    "fedce-rangate": ((66.83, 65.83, 84.07), (31.16, 28.23, 65.44), (19.69, 18.05, 57.38)),
    "fedce-rollgate": ((62.27, 59.65, 82.14), (25.05, 17.11, 57.82), (16.83, 14.37, 58.66)),
    "fedce-fedgate": ((69.98, 69.35, 85.92), (33.73, 28.12, 66.62), (23.59, 18.02, 58.86)),
    "fedsc-rangate": ((55.68, 45.17, 82.48), (40.36, 40.42, 74.49), (14.56, 6.45, 60.04)),
    "fedsc-rollgate": ((56.87, 57.06, 85.75), (39.68, 39.5, 73.89), (16.54, 14.63, 60.4)),
    "fedsc-fedgate": ((64.16, 63.06, 90.54), (59.88, 59.69, 87.72), (50.58, 49.54, 80.56)),
}


def _by_split(rows: dict[str, tuple[Cell, ...]], splits: tuple[str, ...]) -> dict[tuple[str, str], Cell]:
    # The centralised mixture has a number for the first split alone, so rows may be shorter.
    return {(row, split): cell for row, cells in rows.items() for split, cell in zip(splits, cells, strict=False)}


PUBLISHED = {1: _by_split(_TABLE_1, SPLITS), 2: _by_split(_TABLE_2, SPLITS[1:])}
"""{table: {(row, partition): accuracy, macro F1, AUC}}. The local classifier of table 1 is one that always answers the
client's own class."""


@dataclass(frozen=True, slots=True)
class Panel:
    """What the paper says of one panel of its figure 3."""

    macro_f1: float
    local_ratio: float
    """LR: rows that a device answers itself"""


FIGURE_3 = {"fedsc-fedgate": Panel(54.79, 25), "centralised": Panel(90.25, 8), "local": Panel(6.55, 100)}
"""The centralised mixture's F1 is that of table I for IID, the local classifier's that of table II for 0.5."""
