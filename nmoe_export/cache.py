"""Ranges that were found before, of the same graph on the same samples, beside the user's other caches.

A cache that is broken or cannot be written is no error: the ranges are found again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from nmoe_edge.common.files import replace_file
from nmoe_export.calibrate import Range, Recipe, ranges


def cached_ranges(model: onnx.ModelProto, inputs: NDArray[Any], recipe: Recipe, symmetric: bool) -> dict[str, Range]:
    """calibrate.ranges, looked up where they have been found before."""
    folder = _folder()
    if folder is None:
        return ranges(model, inputs, recipe, symmetric)
    facts = [asdict(recipe), symmetric, inputs.dtype.str, inputs.shape, [version(p) for p in ("nmoe", "onnxruntime")]]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(model.SerializeToString(deterministic=True))
    digest.update(np.ascontiguousarray(inputs).data)
    path = folder / f"{digest.hexdigest()}.json"
    known = _read(path)
    if known is None:
        known = ranges(model, inputs, recipe, symmetric)
        _write(path, known)
    return known


def _folder() -> Path | None:
    """None for a user without a home."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # which counts as none, as the specification of these folders says
        try:
            home = Path("~/.cache").expanduser()
        except RuntimeError:
            return None
    return home / "nmoe" / "calibration"


def _read(path: Path) -> dict[str, Range] | None:
    """The ranges of a file that is whole; None for any other."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        plain = json.loads(path.read_bytes())
        if plain["sha256"] == _seal(plain["ranges"]):
            return {name: (float(low), float(high)) for name, (low, high) in plain["ranges"].items()}
    return None


def _write(path: Path, found: Mapping[str, Range]) -> None:
    """Under another name first, so that nobody reads half of it."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"sha256": _seal(found), "ranges": found}, indent=1))


def _seal(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
