"""Calibration ranges cached on disk, one JSON file for each graph, samples and recipe.

The cache never fails an export: when it cannot be read or written, the ranges are computed again.
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
    """calibrate.ranges, from the cache when it has them."""
    folder = _folder()
    if folder is None:
        return ranges(model, inputs, recipe, symmetric)
    versions = [version(package) for package in ("nmoe", "onnxruntime")]
    facts = [asdict(recipe), symmetric, inputs.dtype.str, inputs.shape, versions]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(model.SerializeToString(deterministic=True))
    digest.update(np.ascontiguousarray(inputs).data)
    path = folder / f"{digest.hexdigest()}.json"
    found = _read(path)
    if found is None:
        found = ranges(model, inputs, recipe, symmetric)
        _write(path, found)
    return found


def _folder() -> Path | None:
    """The cache folder; None when the user has no home directory."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification ignores relative paths
        try:
            base = Path("~/.cache").expanduser()
        except RuntimeError:
            return None
    return base / "nmoe" / "calibration"


def _read(path: Path) -> dict[str, Range] | None:
    """The ranges in a cache file; None when it is missing or its checksum does not match."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        plain = json.loads(path.read_bytes())
        if plain["sha256"] == _checksum(plain["ranges"]):
            return {name: (float(low), float(high)) for name, (low, high) in plain["ranges"].items()}
    return None


def _write(path: Path, found: Mapping[str, Range]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"sha256": _checksum(found), "ranges": found}, indent=1), durable=False)


def _checksum(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
