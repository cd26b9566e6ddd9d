"""Reads and writes named arrays in an .npz file without pickle, safe for files from untrusted sources.

numpy's own reader evaluates headers and allocates what they ask for. This reader accepts only what this module and
numpy.savez write: uncompressed arrays of a few dtypes, with headers that match the data length to the byte. Writing
the same arrays twice gives the same bytes.
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
"""The earliest date a zip can store. The current time would make every write different."""


def write_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Encode the arrays as an .npz file; ValueError for a dtype outside DTYPES."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if array.dtype not in DTYPES.values():
                supported = ", ".join(dtype.name for dtype in DTYPES.values())
                raise ValueError(f"the array {name!r} has dtype {array.dtype}; supported are {supported}")
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), member.getvalue())
    return buffer.getvalue()


def read_npz(data: bytes) -> dict[str, NDArray[Any]]:
    """Decode an .npz file into read-only arrays; ValueError for anything but the accepted form."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(members) > MAX_ARRAYS or len(set(names)) < len(names):
                raise ValueError(f"more than {MAX_ARRAYS} arrays, or two arrays with the same name")
            # Overlapping members would make a small file expand into a lot of memory.
            if sum(member.file_size for member in members) > len(data):
                raise ValueError("its arrays claim more bytes than the file contains")
            for name, member in zip(names, members, strict=True):
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"the array {name!r} is compressed")
                arrays[name] = _read_array(archive.read(member), name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        raise ValueError(f"not an .npz: {error}") from error
    return arrays


def _read_array(data: bytes, name: str) -> NDArray[Any]:
    """One .npy file: 6 bytes of magic, 2 of version, 2 of header length, the header, the data."""
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:end])
    if not data.startswith(_MAGIC) or header is None or header[1].decode() not in DTYPES:
        raise ValueError(
            f"the array {name!r} has an unsupported header: expected .npy version 1.0, C order, known dtype"
        )
    dtype = DTYPES[header[1].decode()]
    shape = tuple(int(size) for size in header[2].decode().split(",") if size.strip())
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) - end != expected_bytes:
        raise ValueError(f"the array {name!r} has {len(data) - end} bytes; {dtype} {shape} takes {expected_bytes}")
    return np.frombuffer(data[end:], dtype).reshape(shape)
