"""A file or an array -> the rows that the manifest describes.

Pictures are whatever Pillow reads; arrays are .npy or .npz, without pickle.
"""

from __future__ import annotations

import io
import tokenize
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import InputSpec
from nmoe_edge.common.npz import read_npz
from nmoe_edge.errors import InputError

MOST_BYTES = 256 * 1024 * 1024
MOST_PIXELS = 64_000_000
"""A file of a few kB can unfold to more than a board has."""
MOST_HEADER = 4096
"""Of an .npy, in bytes: numpy's own limit."""


def read_rows(path: Path | str, spec: InputSpec) -> NDArray[Any]:
    """The rows of a file: of a picture one, of an .npy or .npz as many as are in it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        if data[:6] == b"\x93NUMPY":
            return as_rows(_array(data), spec)
        if data[:2] == b"PK":
            arrays = read_npz(data)
            if len(arrays) != 1 and "inputs" not in arrays:
                raise ValueError(f"holds {', '.join(sorted(arrays))[:80]}; one array, or one called inputs, is due")
            return as_rows(arrays["inputs"] if "inputs" in arrays else next(iter(arrays.values())), spec)
        return as_rows(_pixels(data, spec), spec)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def as_rows(array: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    """An array as rows of the manifest's shape and dtype: one row, or rows already; ValueError where it is neither."""
    array = np.asarray(array)
    if array.shape == spec.shape:
        array = array[None]
    if array.shape[1:] != spec.shape or not len(array):
        raise ValueError(f"shape {list(array.shape)} is not rows of {list(spec.shape)}")
    if array.dtype != spec.dtype and not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise ValueError(f"{array.dtype} numbers are not the {spec.dtype} that is due")
    if array.dtype.kind in "iu" and array.dtype != spec.dtype:
        limits = np.iinfo(spec.dtype) if spec.dtype != "float32" else None
        if limits is not None and not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(f"numbers that {spec.dtype} cannot hold")
    with np.errstate(over="ignore"):  # a double that float32 has no room for is an infinity, refused below
        rows = np.ascontiguousarray(array, spec.dtype)
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise ValueError(f"holds NaN, infinity or numbers that {spec.dtype} cannot hold")
    return rows


def outside(rows: NDArray[Any], spec: InputSpec) -> str:
    """What is unlike what the model was calibrated on; empty when all is within it, give or take a hundredth."""
    low, high = spec.range
    least, most, slack = float(rows.min()), float(rows.max()), (high - low) / 100
    if low - slack <= least and most <= high + slack:
        return ""
    return f"values from {least:g} to {most:g}; the model was calibrated on {low:g} to {high:g}"


def _array(data: bytes) -> NDArray[Any]:
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=MOST_HEADER))
    except (tokenize.TokenError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"no sound .npy: {' '.join(str(error).split())[:100]}") from error


def _pixels(data: bytes, spec: InputSpec) -> NDArray[Any]:
    """A picture as one row."""
    from PIL import Image, UnidentifiedImageError

    if spec.layout == "none":
        raise ValueError(f"a picture, or nothing that is known; the model takes {list(spec.shape)} as .npy or .npz")
    channels, height, width = spec.shape if spec.layout == "CHW" else (spec.shape[2], *spec.shape[:2])
    if channels not in (1, 3):
        raise ValueError(f"a picture, but the model takes {channels} channels; give it as .npy or .npz")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns of is refused below, or does not matter here
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels are more than {MOST_PIXELS}")
                picture = image.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:
        raise ValueError("neither a picture that Pillow reads, nor an .npy or .npz") from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's word for a broken file
        raise ValueError(str(error)) from error
    if picture.size != (width, height):
        picture = _resized(picture, (width, height), spec.resize)
    pixels = np.asarray(picture, np.uint8).reshape(height, width, channels)
    if spec.layout == "CHW":
        pixels = pixels.transpose(2, 0, 1)
    low, high = spec.range
    if spec.dtype == "uint8":
        return pixels[None]
    return (low + pixels[None] * ((high - low) / 255)).astype(spec.dtype)


def _resized(picture: Any, size: tuple[int, int], how: str) -> Any:
    """As the manifest says; Pillow's own names stay in here."""
    from PIL import Image, ImageOps

    if how == "exact":
        raise ValueError(f"{picture.width} × {picture.height} pixels, not {size[0]} × {size[1]}")
    smooth = Image.Resampling.BILINEAR
    return picture.resize(size, smooth) if how == "stretch" else ImageOps.fit(picture, size, smooth)
