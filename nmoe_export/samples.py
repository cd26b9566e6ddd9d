"""The samples that calibrate an int8 fleet: half of the run's held-out samples, or the samples of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.common.npz import read_npz
from nmoe_export.calibrate import Recipe, draw_rows
from nmoe_export.errors import SourceError
from nmoe_export.source import Source


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Calibration samples."""

    inputs: NDArray[Any]
    """(n, …), as the extractor takes them"""
    clients: NDArray[np.int64] | None
    """(n,), the client each sample belongs to; None when unknown"""


def samples_of(source: Source, recipe: Recipe) -> Samples:
    """The samples that `recipe` draws. Raises SourceError when there are too few."""
    if recipe.data != "run":
        inputs = _read_inputs(Path(recipe.data.removeprefix("npz:")), source)
        return Samples(inputs[draw_rows(len(inputs), recipe)], None)
    try:
        rows = source.calibration_rows[draw_rows(len(source.calibration_rows), recipe)]
    except SourceError as error:
        others = f"the other {len(source.measured_rows)} samples measure accuracy"
        raise SourceError(f"{error}; {others}") from error
    return Samples(source.inputs[rows], None if source.clients is None else source.clients[rows])


def _read_inputs(path: Path, source: Source) -> NDArray[Any]:
    try:
        inputs = read_npz(path.read_bytes())["inputs"]
    except KeyError:
        raise SourceError(f"{path}: the array 'inputs' is missing") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {error}") from error
    if (inputs.dtype.name, inputs.shape[1:]) != (source.input.dtype, source.input.shape):
        expected = f"{source.input.dtype} {source.input.shape}"
        raise SourceError(f"{path}: each row of inputs is {inputs.dtype} {inputs.shape[1:]}; expected {expected}")
    if not np.isfinite(inputs).all():
        raise SourceError(f"{path}: inputs contain NaN or infinity")
    return inputs
