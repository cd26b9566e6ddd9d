"""A recipe and calibration samples -> the range of each tensor inside a graph.

There are two passes over the samples. The first finds every tensor's minimum and maximum, the second fills histograms
of a fixed size, so memory does not grow with the number of samples. The method minmax needs only the first pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from nmoe_edge.common.schema import from_plain
from nmoe_export.errors import SourceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Range = tuple[float, float]
BATCH = 32
BINS = 2048
MAX_CUT = 0.01
"""The share of the values that the method entropy may cut off."""
LEVELS = 128
"""Levels of one sign in a symmetric int8 range; entropy compares a histogram with that many bins."""
FOLDER = Path(__file__).parents[1] / "calibration"
"""The recipes that can be named without a path."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to calibrate, as calibration/NAME.toml has it; calibration/README.md explains the keys."""

    data: str = "run"
    """`run`: the calibration half of the run's held-out samples; `npz:FILE`: the array `inputs` of an .npz file."""
    samples: int = 4096
    """At most this many samples are drawn, with `seed`."""
    least: int = 32
    """Fewer samples are an error, because a handful of images does not show the range of a tensor."""
    seed: int = 0
    method: Literal["minmax", "percentile", "entropy", "mse"] = "mse"
    percentile: float = 99.99
    """The percentage of the values that the method `percentile` keeps inside the range."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.samples:
            raise ValueError(f"least is {self.least}; expected 1..{self.samples}, the value of samples")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; expected more than 50 and at most 100")
        if self.data != "run" and not self.data.startswith("npz:"):
            raise ValueError(f"data is {self.data!r}; expected run or npz:FILE")


def read_recipe(name: str) -> Recipe:
    """Read a recipe: by its name in calibration/, or from a path that ends in .toml.

    Raises SourceError when it cannot be read.
    """
    if name == "default":
        return Recipe()  # also where only the packages are installed, without calibration/
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        return from_plain(Recipe, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        names = ", ".join(sorted(recipe.stem for recipe in FOLDER.glob("*.toml"))) or "none"
        raise SourceError(f"{path}: {error.strerror}; recipes by name: {names}; or give a file.toml") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error


def draw_rows(count: int, recipe: Recipe) -> NDArray[np.int64]:
    """The numbers of the samples that a recipe draws out of `count`, sorted."""
    if count < recipe.least:
        raise SourceError(
            f"{count} calibration samples are too few: the recipe needs at least {recipe.least}; add samples, or lower"
            " `least` in the recipe"
        )
    rows: NDArray[np.int64] = np.random.default_rng(recipe.seed).permutation(count)[: recipe.samples]
    return np.sort(rows)


def ranges(model: onnx.ModelProto, inputs: NDArray[Any], recipe: Recipe, symmetric: bool = False) -> dict[str, Range]:
    """The range of every float tensor that `model` computes or takes, over these inputs.

    A tensor that is ever infinite or NaN, such as an attention mask, has no range. With `symmetric`, ranges are
    symmetric around zero, and the methods weigh what they cut off against steps of that width.
    """
    watched = _Watched(model)
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for values in watched.batches(inputs):
        for name, value in values.items():
            low[name] = float(np.minimum(low.get(name, np.inf), value.min()))  # np.minimum keeps a NaN
            high[name] = float(np.maximum(high.get(name, -np.inf), value.max()))
    widest = {name: (low[name], high[name]) for name in low if np.isfinite([low[name], high[name]]).all()}
    if symmetric:
        for name, (lowest, highest) in widest.items():
            edge = max(abs(lowest), abs(highest))
            widest[name] = (-edge, edge)
    if recipe.method == "minmax":
        return widest
    counts = {name: np.zeros(BINS, np.int64) for name in widest}
    for values in watched.batches(inputs):
        for name in widest:
            counts[name] += _histogram(values[name], *widest[name])
    choose = _METHODS[recipe.method]
    return {name: choose(counts[name], *widest[name], recipe, symmetric) for name in widest}


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """The names of the float tensors that a graph computes, in order."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    computed = [name for node in graph.node for name in node.output]
    return [name for name in computed if kinds.get(name) == onnx.TensorProto.FLOAT]


class _Watched:
    """A session that returns every float tensor that a graph computes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        self._names = float_tensors(model)
        outputs = {value.name for value in watched.graph.output}
        hidden = [name for name in self._names if name not in outputs]
        watched.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in hidden
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # fatal errors only
        self._session = onnxruntime.InferenceSession(
            watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0]

    def batches(self, inputs: NDArray[Any]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Every tensor by name, batch by batch. The input is included when it is float32."""
        for start in range(0, len(inputs), BATCH):
            rows = inputs[start : start + BATCH]
            values = dict(zip(self._names, self._session.run(self._names, {self._input.name: rows}), strict=True))
            if rows.dtype == np.float32:
                values[self._input.name] = rows
            yield values


def _histogram(value: NDArray[np.float32], low: float, high: float) -> NDArray[np.int64]:
    """Counts in BINS bins between low and high, which may be equal."""
    bins = (value.astype(np.float64).ravel() - low) / max(high - low, 1e-300) * BINS
    return np.bincount(bins.clip(0, BINS - 1).astype(np.int64), minlength=BINS)


def _percentile(counts: NDArray[np.int64], low: float, high: float, recipe: Recipe, symmetric: bool) -> Range:
    """The range that keeps a percentage of the values, cutting off equally many on either side."""
    outside = (1 - recipe.percentile / 100) / 2 * counts.sum()
    if symmetric:
        counts = counts + counts[::-1]  # equal counts of either sign, so that both sides end alike
        outside *= 2
    below = np.searchsorted(counts.cumsum(), outside, side="right")
    above = np.searchsorted(counts[::-1].cumsum(), outside, side="right")
    width = (high - low) / BINS
    return low + float(below) * width, high - float(above) * width


def _mse(counts: NDArray[np.int64], low: float, high: float, _recipe: Recipe, symmetric: bool) -> Range:
    """The shrunken range with the smallest mean squared error of rounding and cutting off."""
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    steps = 254 if symmetric else 255  # from -127 to 127, or from 0 to 255

    def error(share: float) -> float:
        a, b = low * share, high * share
        step = max(b - a, 1e-30) / steps
        rounded = np.rint((centres.clip(a, b) - a) / step) * step + a
        return float((counts * (rounded - centres) ** 2).sum())

    share = min(np.linspace(0.3, 1, 71)[::-1], key=error)
    return float(low * share), float(high * share)


def _entropy(counts: NDArray[np.int64], low: float, high: float, _recipe: Recipe, _symmetric: bool) -> Range:
    """The shrunken range with the least Kullback-Leibler divergence between the exact and the quantized histogram."""
    magnitude = max(abs(low), abs(high), 1e-30)
    centres = np.abs(low + (np.arange(BINS) + 0.5) * (high - low) / BINS)
    magnitudes = np.bincount(np.minimum((centres / magnitude * BINS).astype(int), BINS - 1), counts, BINS)

    def divergence(kept: int) -> float:
        p = magnitudes[:kept].copy()
        p[-1] += magnitudes[kept:].sum()  # values that are cut off land on the edge
        levels = np.arange(kept) * LEVELS // kept
        filled = magnitudes[:kept] > 0
        sums = np.bincount(levels, magnitudes[:kept], LEVELS)
        sizes = np.bincount(levels, filled, LEVELS)
        q = np.where(filled, (sums / np.maximum(sizes, 1))[levels], 0)
        known = p > 0
        q = np.maximum(q, 1e-3)  # counts, so that q is positive where only values that were cut off land
        p, q = p / p.sum(), q / q[known].sum()
        return float((p[known] * np.log(p[known] / q[known])).sum())

    # Cutting off nearly everything has no divergence either: all values are on the edge in both. So the cut is limited.
    tails = magnitudes.sum() - magnitudes.cumsum()
    allowed = [kept for kept in range(BINS, LEVELS - 1, -16) if tails[kept - 1] <= MAX_CUT * magnitudes.sum()]
    edge = magnitude * min(allowed, key=divergence) / BINS
    return max(low, -edge), min(high, edge)


_METHODS: Mapping[str, Callable[[NDArray[np.int64], float, float, Recipe, bool], Range]] = {
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
