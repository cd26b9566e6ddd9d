"""Converts a file or an array to input rows of the shape and dtype that the manifest describes.

Files are images in any format that Pillow reads, or arrays as .npy or .npz without pickle.
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

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 64_000_000
"""A compressed image of a few kB can need more memory than a board has."""
MAX_HEADER_BYTES = 4096
"""Header of an .npy; numpy stops at this size too."""


def read_rows(path: Path | str, spec: InputSpec) -> NDArray[Any]:
    """Read rows (n, *spec.shape) from a file: one from an image, all from an .npy or .npz; InputError if invalid."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        if data.startswith(b"\x93NUMPY"):
            array = _from_npy(data)
        elif data.startswith(b"PK"):
            array = _from_npz(data)
        else:
            array = _from_image(data, spec)
        return as_rows(array, spec)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def as_rows(array: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    """Convert one row, or an array of rows, to rows (n, *spec.shape) of spec.dtype; ValueError if it does not fit."""
    array = np.asarray(array)
    if array.shape == spec.shape:
        array = array[None]
    if array.shape[1:] != spec.shape or not len(array):
        raise ValueError(f"shape {list(array.shape)} is not rows of {list(spec.shape)}")
    if array.dtype != spec.dtype and not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise ValueError(f"dtype {array.dtype} cannot be converted safely; expected {spec.dtype}")
    if array.dtype.kind in "iu" and array.dtype != spec.dtype:
        limits = np.iinfo(spec.dtype) if spec.dtype != "float32" else None
        if limits is not None and not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(f"holds numbers that {spec.dtype} cannot hold")
    with np.errstate(over="ignore"):  # a double outside the range of float32 becomes an infinity, refused below
        rows = np.ascontiguousarray(array, spec.dtype)
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise ValueError(f"holds NaN, infinity or numbers that {spec.dtype} cannot hold")
    return rows


def range_warning(rows: NDArray[Any], spec: InputSpec) -> str:
    """A warning if values exceed the range the model was calibrated on by more than 1 % of its width, else empty."""
    low, high = spec.range
    lowest = float(rows.min())
    highest = float(rows.max())
    slack = (high - low) / 100
    if low - slack <= lowest and highest <= high + slack:
        return ""
    return f"values from {lowest:g} to {highest:g}; the model was calibrated on {low:g} to {high:g}"


def _from_npy(data: bytes) -> NDArray[Any]:
    try:
        file = io.BytesIO(data)
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER_BYTES))
    except (tokenize.TokenError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a valid .npy: {' '.join(str(error).split())[:100]}") from error


def _from_npz(data: bytes) -> NDArray[Any]:
    """The array named inputs, or the only one."""
    arrays = read_npz(data)
    if "inputs" in arrays:
        return arrays["inputs"]
    if len(arrays) != 1:
        raise ValueError(f"holds {', '.join(sorted(arrays))[:80]}; expected one array, or one named inputs")
    (array,) = arrays.values()
    return array


def _from_image(data: bytes, spec: InputSpec) -> NDArray[Any]:
    """Decode an image to one row (1, *spec.shape); pixels 0..255 are scaled to spec.range unless it is uint8."""
    if spec.layout == "none":
        raise ValueError(f"not an .npy or .npz file; the model takes {list(spec.shape)} as .npy or .npz")
    if spec.layout == "CHW":
        channels, height, width = spec.shape
    else:
        height, width, channels = spec.shape
    if channels not in (1, 3):
        raise ValueError(f"an image, but the model takes {channels} channels; give it as .npy or .npz")
    picture = _decode(data, "L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = _resize(picture, (width, height), spec.resize)
    pixels = np.asarray(picture, np.uint8).reshape(height, width, channels)
    if spec.layout == "CHW":
        pixels = pixels.transpose(2, 0, 1)
    if spec.dtype == "uint8":
        return pixels[None]
    low, high = spec.range
    return (low + pixels[None] * ((high - low) / 255)).astype(spec.dtype)


def _decode(data: bytes, mode: str) -> Any:
    """Decode an image with Pillow; mode: L for grey, RGB for colour."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings concern what is refused below, or metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS}")
                return image.convert(mode)
    except UnidentifiedImageError:
        raise ValueError("neither an image that Pillow can read, nor an .npy or .npz") from None
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises SyntaxError for a broken file
        raise ValueError(str(error)) from error


def _resize(picture: Any, size: tuple[int, int], how: str) -> Any:
    """Resize a Pillow image to `size` = (width, height); how: InputSpec.resize."""
    from PIL import Image, ImageOps

    if how == "exact":
        raise ValueError(f"{picture.width} × {picture.height} pixels, not {size[0]} × {size[1]}")
    smooth = Image.Resampling.BILINEAR
    if how == "stretch":
        return picture.resize(size, smooth)
    return ImageOps.fit(picture, size, smooth)
