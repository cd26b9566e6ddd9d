"""Figures 3, 4a and 4b of the paper and the learning curves: their data, and their page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmoe_train.results.pages.charts import Figure, curves, figure, heat_map
from nmoe_train.results.pages.render import FIGURES, render
from nmoe_train.results.paper.cells import Value, figures_of, value_of
from nmoe_train.results.paper.folder import Done
from nmoe_train.results.paper.published import FIGURE_3
from nmoe_train.results.paper.units import EXTRACTORS, ROWS, Unit

_TEST_SETS = {"own": "own", "iid": "balanced"}


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A panel: which device asks which expert."""

    title: str
    matrix: Sequence[Sequence[float]]
    """(devices, experts); each row sums to 1"""
    caption: str


@dataclass(frozen=True, slots=True)
class Lines:
    """A panel of lines, each with its points {x: y}."""

    title: str
    series: Mapping[str, Mapping[float, Value]]
    x_label: str
    y_label: str
    caption: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure: its file's name without suffix, its title and its panels."""

    name: str
    title: str
    panels: Sequence[HeatMap | Lines]
    one_scale: bool = False
    """Whether all panels have the same y axis"""


def figure_3(done: Done, partition: str) -> Drawing:
    """The gating pattern of FedSC with FedGate, of the centralised mixture and of local classifiers."""
    panels = []
    for row, published in FIGURE_3.items():
        (own,) = figures_of(done, row, partition, "own", [0])
        (balanced,) = figures_of(done, row, partition, "iid", [0])
        count = len(done[Unit(partition, "fedsc", "fedgate", 0).name]["own"]["routing"])
        alone = [[float(i == j) for j in range(count)] for i in range(count)]
        ratio = 100 * own.get("kept_local", 1.0)
        title = f"{ROWS[row]}: F1 {100 * own['macro_f1']:.1f} %, LR {ratio:.0f} %"
        title += f" (paper: {published.macro_f1:.1f}, {published.local_ratio:.0f})"
        on_balanced = f"F1 on balanced rows: {100 * balanced['macro_f1']:.1f} %"
        caption = f"{title}. {on_balanced}. LR: the share of rows that a device answers itself."
        panels.append(HeatMap(title, own.get("routing", alone), caption))
    return Drawing("figure-3", f"Figure 3: which device asks which expert, {partition}", panels)


def figure_4a(done: Done, sizes: Mapping[tuple[str, int], int | None], seeds: int) -> Drawing:
    """Accuracy when one data set is split among more and more clients, with FedGate.

    sizes: as in `units.split_units`
    """
    panels = []
    for partition in dict.fromkeys(of for of, _ in sizes):
        counts = {clients: samples for (of, clients), samples in sizes.items() if of == partition}

        def point(extractor: str, part: str, clients: int, of: str = partition, counts: Any = counts) -> Value:
            shape = () if counts[clients] is None else (clients, counts[clients])
            found = [done[Unit(of, extractor, "fedgate", seed, *shape).name] for seed in range(seeds)]
            return value_of([figures[part]["accuracy"] for figures in found])

        panels.append(_comparison(partition, counts, point, "clients"))
    return Drawing("figure-4a", "Figure 4a: one data set, split among more and more clients", panels, True)


def figure_4b(done: Done, partitions: Sequence[str], seeds: int, clients: int) -> Drawing:
    """Accuracy against k, the number of experts that a row is sent to, with FedGate."""
    panels = []
    for partition in partitions:

        def point(extractor: str, part: str, k: int, of: str = partition) -> Value:
            found = [done[Unit(of, extractor, f"top-{k}", seed).name] for seed in range(seeds)]
            return value_of([figures[part]["accuracy"] for figures in found])

        panels.append(_comparison(partition, range(1, clients + 1), point, "k"))
    return Drawing("figure-4b", "Figure 4b: accuracy against the number of experts per row", panels, True)


def _comparison(
    partition: str, xs: Sequence[int] | Mapping[int, Any], point: Callable[[str, str, int], Value], x_label: str
) -> Lines:
    """One panel with the accuracy of both extractors on both test sets."""
    series = {
        f"{name}, {tested_on}": {float(x): point(extractor, part, x) for x in xs}
        for extractor, name in EXTRACTORS.items()
        for part, tested_on in _TEST_SETS.items()
    }
    meaning = {"clients": "number of clients", "k": "number of experts per row, k"}[x_label]
    caption = f"{partition}: accuracy with FedGate against the {meaning}, on own and on balanced rows."
    return Lines(partition, series, meaning, "percent", caption)


def learning_curves(histories: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> Drawing:
    """How stages 1 and 3 learn.

    histories: {(partition, extractor): history of the run's metrics.json}
    """
    partitions = list(dict.fromkeys(partition for partition, _ in histories))
    panels = list(_stage_curves(histories, partitions))
    return Drawing("curves", "Learning curves", panels)


def _stage_curves(histories: Mapping[tuple[str, str], Any], partitions: Sequence[str]) -> Iterator[Lines]:
    def panel(extractor: str, stage: str, key: str, scale: float, title: str, y_label: str) -> Lines:
        series = {}
        for partition in partitions:
            entries = [entry for entry in histories[partition, extractor] if entry["stage"] == stage and key in entry]
            series[partition] = {float(entry["round"]): Value(scale * entry[key], None) for entry in entries}
        return Lines(title, series, "round", y_label, f"{title}.")

    yield panel("fedce", "extractor", "accuracy", 100, "Accuracy of FedCE's classifier on training samples", "percent")
    for extractor, name in EXTRACTORS.items():
        yield panel(extractor, "extractor", "loss", 1, f"Loss of {name}", "loss")
    for extractor, name in EXTRACTORS.items():
        yield panel(extractor, "gate", "loss", 1, f"Loss of FedGate on {name}", "loss")


def page_of(drawing: Drawing) -> str:
    """The figure as an HTML page that opens offline."""
    return render(FIGURES, title=drawing.title, figures=[_chart(panel) for panel in drawing.panels])


def _chart(panel: HeatMap | Lines) -> Figure:
    if isinstance(panel, HeatMap):
        names = [str(i) for i in range(len(panel.matrix))]
        return figure(heat_map, panel.matrix, names, names, caption=panel.caption)
    series = {name: [(x, value.mean) for x, value in points.items()] for name, points in panel.series.items()}
    return figure(curves, series, panel.x_label, panel.y_label, caption=panel.caption)
