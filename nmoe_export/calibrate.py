"""Which range each tensor inside a graph keeps to: a recipe and streamed batches -> ranges.

Two passes over the data: the first finds every tensor's least and greatest value, the second counts into histograms of
a fixed size. So memory does not grow with the number of samples. MinMax needs only the first.
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
MOST_CUT = 0.01
"""Share of the values that entropy may leave out."""
LEVELS = 128
"""Of a symmetric half: what a histogram is weighed against by entropy and mse."""
FOLDER = Path(__file__).parents[1] / "calibration"
"""Where recipes stand that are called by name."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """calibration/NAME.toml."""

    data: str = "run"
    """`run`: the shown half of the run's held-out samples; `npz:FILE`: the array `inputs` of an .npz."""
    samples: int = 4096
    """At most so many, drawn with `seed`."""
    least: int = 32
    """Fewer are an error: ranges of a handful of images are no ranges."""
    seed: int = 0
    method: Literal["minmax", "percentile", "entropy", "mse"] = "mse"
    percentile: float = 99.99
    """Of the values, that the method of that name keeps inside."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.samples:
            raise ValueError(f"least is {self.least}, not in 1..{self.samples}, the samples")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, not in 50..100")
        if self.data != "run" and not self.data.startswith("npz:"):
            raise ValueError(f"no data is called {self.data!r}; there are run and npz:FILE")


def read_recipe(name: str) -> Recipe:
    """A recipe by its name in calibration/, or from a file."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        return from_plain(Recipe, tomllib.loads(path.read_text()))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise SourceError(f"{path}: {error.strerror}; there are {known or 'no recipes'}, or a file.toml") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error


def drawn(count: int, recipe: Recipe) -> NDArray[np.int64]:
    """Which of so many samples a recipe takes."""
    if count < recipe.least:
        raise SourceError(f"{count} calibration samples; the recipe asks for {recipe.least} at least")
    rows: NDArray[np.int64] = np.random.default_rng(recipe.seed).permutation(count)[: recipe.samples]
    return np.sort(rows)


def ranges(model: onnx.ModelProto, inputs: NDArray[Any], recipe: Recipe, symmetric: bool = False) -> dict[str, Range]:
    """The range of every float tensor that `model` computes or takes, over these inputs.

    A tensor that is ever infinite, such as a mask of attention, has none. symmetric: around zero, as it will be
    rounded, so what is cut off is weighed against steps of that width.
    """
    watched = _Watched(model)
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for values in watched.batches(inputs):
        for name, value in values.items():
            low[name] = float(np.minimum(low.get(name, np.inf), value.min()))  # a NaN stays one
            high[name] = float(np.maximum(high.get(name, -np.inf), value.max()))
    widest = {name: (low[name], high[name]) for name in low if np.isfinite([low[name], high[name]]).all()}
    if symmetric:
        widest = {name: (-edge, edge) for name, edge in ((n, max(map(abs, both))) for n, both in widest.items())}
    if recipe.method == "minmax":
        return widest
    counts = {name: np.zeros(BINS, np.int64) for name in widest}
    for values in watched.batches(inputs):
        for name in widest:
            counts[name] += _counted(values[name], *widest[name])
    choose = _METHODS[recipe.method]
    return {name: choose(counts[name], *widest[name], recipe, symmetric) for name in widest}


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """The names of what a graph computes in floats, in order."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return [name for node in graph.node for name in node.output if kinds.get(name) == onnx.TensorProto.FLOAT]


class _Watched:
    """A graph that puts out everything it computes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        made = float_tensors(model)
        outputs = {value.name for value in shown.graph.output}
        shown.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in made
            if name not in outputs
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = onnxruntime.InferenceSession(
            shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._names, self._input = made, self._session.get_inputs()[0]

    def batches(self, inputs: NDArray[Any]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Every tensor, batch by batch; the input too where it is one of floats."""
        for start in range(0, len(inputs), BATCH):
            rows = inputs[start : start + BATCH]
            values = dict(zip(self._names, self._session.run(self._names, {self._input.name: rows}), strict=True))
            if rows.dtype == np.float32:
                values[self._input.name] = rows
            yield values


def _counted(value: NDArray[np.float32], low: float, high: float) -> NDArray[np.int64]:
    """A histogram of BINS between low and high, however near they are to each other."""
    place = (value.astype(np.float64).ravel() - low) / max(high - low, 1e-300) * BINS
    return np.bincount(place.clip(0, BINS - 1).astype(np.int64), minlength=BINS)


def _percentile(counts: NDArray[np.int64], low: float, high: float, recipe: Recipe, symmetric: bool) -> Range:
    """What keeps so many percent of the values inside, as many outside on either side."""
    outside = (1 - recipe.percentile / 100) / 2 * counts.sum()
    if symmetric:
        counts = counts + counts[::-1]  # of either sign as many, so that both sides end alike
        outside *= 2
    below = np.searchsorted(counts.cumsum(), outside, side="right")
    above = np.searchsorted(counts[::-1].cumsum(), outside, side="right")
    width = (high - low) / BINS
    return low + float(below) * width, high - float(above) * width


def _mse(counts: NDArray[np.int64], low: float, high: float, _recipe: Recipe, symmetric: bool) -> Range:
    """The shrunken range with the least mean squared error of rounding and of cutting off."""
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS

    def error(share: float) -> float:
        a, b = low * share, high * share
        step = max(b - a, 1e-30) / (254 if symmetric else 255)  # from -127 to 127, from 0 to 255
        rounded = np.rint((centres.clip(a, b) - a) / step) * step + a
        return float((counts * (rounded - centres) ** 2).sum())

    share = min(np.linspace(0.3, 1, 71)[::-1], key=error)
    return float(low * share), float(high * share)


def _entropy(counts: NDArray[np.int64], low: float, high: float, _recipe: Recipe, _symmetric: bool) -> Range:
    """The shrunken range whose quantized histogram is least surprised by the whole one (Kullback-Leibler)."""
    magnitude = max(abs(low), abs(high), 1e-30)
    centres = np.abs(low + (np.arange(BINS) + 0.5) * (high - low) / BINS)
    half = np.bincount(np.minimum((centres / magnitude * BINS).astype(int), BINS - 1), counts, BINS)  # of |x|

    def surprise(kept: int) -> float:
        p = half[:kept].copy()
        p[-1] += half[kept:].sum()  # what is cut off falls on the edge
        bins = np.arange(kept) * LEVELS // kept
        filled = half[:kept] > 0
        sums, sizes = np.bincount(bins, half[:kept], LEVELS), np.bincount(bins, filled, LEVELS)
        q = np.where(filled, (sums / np.maximum(sizes, 1))[bins], 0)
        known = p > 0
        q = np.maximum(q, 1e-3)  # of a count: where nothing was before what is cut off falls there
        p, q = p / p.sum(), q / q[known].sum()
        return float((p[known] * np.log(p[known] / q[known])).sum())

    # Cutting everything away surprises nobody: a lump at the edge is a lump again. So a hundredth at most may go.
    tails = half.sum() - half.cumsum()
    kept = min((k for k in range(BINS, LEVELS - 1, -16) if tails[k - 1] <= MOST_CUT * half.sum()), key=surprise)
    edge = magnitude * kept / BINS
    return max(low, -edge), min(high, edge)


_METHODS: Mapping[str, Callable[[NDArray[np.int64], float, float, Recipe, bool], Range]] = {
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
