"""Named arrays in an .npz, without pickle and without trust.

numpy's own reader allocates what a header asks for before it looks at how much there is. This one takes arrays of a
closed list of dtypes, stored uncompressed, whose headers agree with their lengths to the byte. Two writes of the same
arrays are the same bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = frozenset(np.dtype(name) for name in ("u1", "i1", "<i4", "<i8", "<f2", "<f4", "<f8"))
MAX_ARRAYS = 64
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip knows: a timestamp would make every write another file."""


def write_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as the bytes of an .npz."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if array.dtype not in DTYPES:
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
            if len(members) > MAX_ARRAYS:
                raise ValueError(f"more than {MAX_ARRAYS} arrays")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                    raise ValueError(f"the array {name!r} is compressed")
                arrays[name] = _read_array(archive.read(member), name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"not an .npz: {error}") from error
    return arrays


def _read_array(data: bytes, name: str) -> NDArray[Any]:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"the array {name!r} is of another format than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype not in DTYPES or fortran:
        raise ValueError(f"the array {name!r} is {dtype}, which no .npz of ours holds")
    body = data[stream.tell() :]
    if len(body) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"the array {name!r} has {len(body)} bytes, not those of {dtype} {shape}")
    array: NDArray[Any] = np.frombuffer(body, dtype).reshape(shape)
    return array
