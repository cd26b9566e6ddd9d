"""Named arrays in an .npz, without pickle and without trust.

numpy's own reader evaluates headers and allocates what they ask for. This one reads exactly what it and numpy.savez
write: arrays of a closed list of dtypes, stored uncompressed, whose headers agree with their lengths to the byte. Two
writes of the same arrays are the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {descr: np.dtype(descr) for descr in ("|u1", "|i1", "<i4", "<i8", "<f2", "<f4", "<f8")}
MAX_ARRAYS = 64
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '([|<][a-z]\d)', 'fortran_order': False, 'shape': \(([0-9, ]{0,80})\), \} *\n")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip knows: a timestamp would make every write another file."""


def write_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as the bytes of an .npz."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if array.dtype not in DTYPES.values():
                raise ValueError(f"the array {name!r} is {array.dtype}, which no .npz of ours holds")
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), member.getvalue())
    return buffer.getvalue()


def read_npz(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays in the bytes of an .npz, read-only; ValueError when anything about it is odd."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(members) > MAX_ARRAYS or len(set(names)) < len(names):
                raise ValueError(f"more than {MAX_ARRAYS} arrays, or one of them twice")
            # Members that overlap would make much out of little.
            if sum(member.file_size for member in members) > len(data):
                raise ValueError("its arrays are larger than itself")
            for name, member in zip(names, members, strict=True):
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"the array {name!r} is compressed")
                arrays[name] = _read_array(archive.read(member), name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        raise ValueError(f"not an .npz: {error}") from error
    return arrays


def _read_array(data: bytes, name: str) -> NDArray[Any]:
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:end])
    if not data.startswith(_MAGIC) or header is None or header[1].decode() not in DTYPES:
        raise ValueError(f"the array {name!r} is no plain array of ours")
    dtype = DTYPES[header[1].decode()]
    shape = tuple(int(size) for size in header[2].decode().split(",") if size.strip())
    if len(data) - end != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the array {name!r} has {len(data) - end} bytes, not those of {dtype} {shape}")
    return np.frombuffer(data[end:], dtype).reshape(shape)
