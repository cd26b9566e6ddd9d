"""Rows of numbers as bytes: the format of latents, inputs and answers in messages.

There are five dtypes. `int8` is symmetric int8 with one float32 scale per row, all scales first; the others are plain
little-endian arrays. A Tensor validates itself: its length fits its shape, and it holds no NaN and no infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.errors import LocalProtocolError

DTYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
LATENT_DTYPES = ("int8", "float16", "float32")
"""How latents may be sent; the exporter chooses one and records it in the manifest."""

SCALE_BYTES = 4
MAX_DIMS = 4
"""Dimensions of one row; the header has four fields for them."""
MAX_SCALE = float(np.finfo(np.float32).max) / 128
"""With a larger scale the code -128 would decode to minus infinity."""


def payload_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that rows of this shape need, scales included."""
    scales = SCALE_BYTES * shape[0] if dtype == "int8" else 0
    return math.prod(shape) * DTYPES[dtype].itemsize + scales


_SOURCES: dict[str, tuple[np.dtype[Any], Literal["safe", "same_kind"]]] = {
    "uint8": (DTYPES["uint8"], "safe"),
    "int8": (np.dtype(np.float32), "same_kind"),
    "int64": (DTYPES["int64"], "safe"),
    "float16": (DTYPES["float16"], "same_kind"),
    "float32": (DTYPES["float32"], "same_kind"),
}
"""The dtype that an array must be castable to, and how: floats may be rounded, integers never wrap."""


def _check_shape(shape: tuple[int, ...]) -> None:
    if not 2 <= len(shape) <= 1 + MAX_DIMS:
        raise LocalProtocolError(f"shape {shape} must be rows of 1 to {MAX_DIMS} dimensions")
    if min(shape) < 1:
        raise LocalProtocolError(f"shape {shape} has an empty dimension")


def _quantize(rows: NDArray[np.float32]) -> bytes:
    """(rows, values) -> the scale max|row| / 127 of every row, then the codes."""
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    if not scales.max() <= MAX_SCALE:
        raise LocalProtocolError("the rows hold NaN, infinity or values too large for an int8 scale")
    steps = rows / np.where(scales > 0, scales, np.float32(1))[:, None]  # a row of zeros stays zeros
    # Clipped because the smallest scales are themselves rounded.
    codes: NDArray[np.int8] = np.rint(steps).clip(-127, 127).astype(np.int8)
    return b"".join((scales.astype("<f4").tobytes(), codes.tobytes()))


@dataclass(frozen=True, slots=True)
class Tensor:
    """Rows in the form in which they are sent."""

    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    """(rows, …), no dimension zero"""
    data: bytes
    """payload_bytes(dtype, shape) bytes"""

    def __post_init__(self) -> None:
        stored = DTYPES.get(self.dtype)
        if stored is None:
            raise LocalProtocolError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        _check_shape(self.shape)
        expected = payload_bytes(self.dtype, self.shape)
        if len(self.data) != expected:
            raise LocalProtocolError(f"{len(self.data)} bytes for {self.dtype} {self.shape}, which needs {expected}")
        if self.dtype == "int8":
            scales = self.scales()
            if not (scales.min() >= 0 and scales.max() <= MAX_SCALE):  # written so that NaN is refused too
                raise LocalProtocolError("a row's int8 scale is negative, too large or NaN")
        elif stored.kind == "f":
            finite = np.isfinite(np.frombuffer(self.data, stored))
            if not finite[finite.argmin()]:  # twice as fast as all() on one row
                raise LocalProtocolError("the rows hold NaN or infinity")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @classmethod
    def pack(cls, array: NDArray[Any], dtype: str) -> Tensor:
        """Convert an array to `dtype`, rounding floats; LocalProtocolError where values would be lost."""
        if dtype == "float32" and array.dtype == DTYPES[dtype]:  # every Answer: __post_init__ checks it
            return cls(dtype, array.shape, array.tobytes())
        _check_shape(array.shape)
        if dtype not in DTYPES or not np.can_cast(array.dtype, *_SOURCES[dtype]):
            raise LocalProtocolError(f"{array.dtype} values cannot be sent as {dtype!r}")
        if dtype == "int8":
            data = _quantize(np.asarray(array, np.float32).reshape(len(array), -1))
        else:
            with np.errstate(over="ignore"):  # a float16 overflow becomes infinity, which is refused below
                data = array.astype(DTYPES[dtype]).tobytes()
        return cls(dtype, array.shape, data)

    def unpack(self) -> NDArray[Any]:
        """The rows as an array: int8 and float16 as float32, other dtypes unchanged."""
        if self.dtype == "int8":
            codes = self.values().reshape(self.rows, -1).astype(np.float32)
            return (codes * self.scales()[:, None]).reshape(self.shape)
        values = np.frombuffer(self.data, DTYPES[self.dtype]).reshape(self.shape)
        return values.astype(np.float32) if self.dtype == "float16" else values

    def values(self) -> NDArray[Any]:
        """The stored numbers, flat and without scales: a read-only view."""
        offset = SCALE_BYTES * self.rows if self.dtype == "int8" else 0
        return np.frombuffer(self.data, DTYPES[self.dtype], offset=offset)

    def scales(self) -> NDArray[np.float32]:
        """The scale of each int8 row: a read-only view."""
        return np.frombuffer(self.data, "<f4", count=self.rows)
