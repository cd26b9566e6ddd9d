"""The samples that an int8 fleet is calibrated on: the shown half of the run's own, or somebody's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.common.npz import read_npz
from nmoe_export.calibrate import Recipe, drawn
from nmoe_export.errors import SourceError
from nmoe_export.source import Source


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What calibrates extractor, gates and experts."""

    inputs: NDArray[Any]
    """(n, …)"""
    clients: NDArray[np.int64] | None
    """Whose each is (n,); None where nobody knows."""


def samples_of(source: Source, recipe: Recipe) -> Samples:
    """Those that the recipe takes; SourceError where there are too few."""
    if recipe.data != "run":
        inputs = _inputs_of(Path(recipe.data.removeprefix("npz:")), source)
        return Samples(inputs[drawn(len(inputs), recipe)], None)
    try:
        rows = source.shown[drawn(len(source.shown), recipe)]
    except SourceError as error:
        raise SourceError(f"{error}; the other half, {len(source.measured)}, measures") from error
    return Samples(source.inputs[rows], None if source.clients is None else source.clients[rows])


def _inputs_of(path: Path, source: Source) -> NDArray[Any]:
    try:
        inputs = read_npz(path.read_bytes())["inputs"]
    except KeyError:
        raise SourceError(f"{path}: holds no array called inputs") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {error}") from error
    if (inputs.dtype.name, inputs.shape[1:]) != (source.input.dtype, source.input.shape):
        raise SourceError(
            f"{path}: inputs are {inputs.dtype} {inputs.shape[1:]}, not {source.input.dtype} {source.input.shape}"
        )
    if not np.isfinite(inputs).all():
        raise SourceError(f"{path}: inputs hold NaN or infinity")
    return inputs
