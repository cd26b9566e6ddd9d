"""A figure as PDF and PNG. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from nmoe_train.errors import RunError
from nmoe_train.results.pages.svg import COLOURS
from nmoe_train.results.paper.figures import Drawing, HeatMap, Lines

MARKERS = "os^Dv*"
LINES = ("-", "--", ":", "-.")
PANEL_INCHES = (3.4, 3.0)
MOST_COLUMNS = 3


def save(drawing: Drawing, folder: Path) -> list[Path]:
    """Write <name>.pdf and <name>.png, and return their paths. The same data gives the same bytes."""
    columns = min(MOST_COLUMNS, len(drawing.panels))
    rows = -(-len(drawing.panels) // columns)
    plot = Figure((PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    first = None
    for number, panel in enumerate(drawing.panels, 1):
        axes = plot.add_subplot(rows, columns, number, sharey=first if drawing.one_scale else None)
        first = first or axes
        if isinstance(panel, HeatMap):
            _heat_map(axes, panel)
        else:
            _lines(axes, panel)
    canvases: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "pdf": (FigureCanvasPdf, {"CreationDate": None}),
        "png": (FigureCanvasAgg, {"Software": None}),
    }
    written = []
    for suffix, (canvas, metadata) in canvases.items():
        path = folder / f"{drawing.name}.{suffix}"
        canvas(plot)
        try:
            plot.savefig(path, dpi=200, metadata=metadata)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
        written.append(path)
    return written


def _heat_map(axes: Any, panel: HeatMap) -> None:
    axes.imshow(panel.matrix, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(panel.title.replace(": ", "\n", 1), fontsize=9)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("device", fontsize=8)
    axes.tick_params(labelsize=7)
    if len(panel.matrix) > 12:
        return
    axes.set_xticks(range(len(panel.matrix)))
    axes.set_yticks(range(len(panel.matrix)))
    for row, shares in enumerate(panel.matrix):
        for column, share in enumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)


def _lines(axes: Any, panel: Lines) -> None:
    for number, (name, points) in enumerate(panel.series.items()):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
        if len(points) <= 20:
            style["marker"] = MARKERS[number % len(MARKERS)]
        spreads = [value.spread or 0.0 for value in points.values()]
        means = [value.mean for value in points.values()]
        error_bars = spreads if any(spreads) else None
        axes.errorbar(list(points), means, error_bars, label=name, markersize=3, linewidth=1, capsize=2, **style)
    xs = next(iter(panel.series.values()))
    if len(xs) <= 12:
        axes.set_xticks(list(xs))
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x_label, fontsize=8)
    axes.set_ylabel(panel.y_label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
