"""Reading and writing .npz without pickle."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe_edge.common.npz import read_npz, write_npz


def overlapping(members):
    """A small zip with `members` entries that all refer to the same bytes."""
    whole = zipped({"a.npy": npy(np.zeros(1000))})
    start, end = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    entry = whole[start:end]
    entries = b"".join(entry.replace(b"a.npy", b"%05d" % number) for number in range(members))
    tail = bytearray(whole[end:])
    tail[8:16] = members.to_bytes(2, "little") * 2 + len(entries).to_bytes(4, "little")
    return whole[:start] + entries + bytes(tail)


ARRAYS = {
    "inputs": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "scale": np.array(0.5),
    "none": np.zeros((0, 4), np.float32),
    "labels": np.array([1, 2], np.int64),
}


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array=None, header=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(4.0) if array is None else array, version=(1, 0))
    data = stream.getvalue()
    return data if header is None else data[:10] + header.ljust(117).encode() + b"\n" + data[128:]


def test_arrays_are_read_back_unchanged():
    back = read_npz(write_npz(ARRAYS))
    assert list(back) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], array)


def test_numpy_reads_our_files():
    with np.load(io.BytesIO(write_npz(ARRAYS)), allow_pickle=False) as archive:
        assert all(np.array_equal(archive[name], array) for name, array in ARRAYS.items())


def test_files_of_numpy_savez_are_read():
    stream = io.BytesIO()
    np.savez(stream, labels=ARRAYS["labels"])
    assert np.array_equal(read_npz(stream.getvalue())["labels"], ARRAYS["labels"])


def test_writing_the_same_arrays_twice_gives_the_same_bytes():
    assert write_npz(ARRAYS) == write_npz(ARRAYS)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([object()]), np.array([1j])])
def test_an_unsupported_dtype_is_not_written(array):
    with pytest.raises(ValueError, match="'odd'"):
        write_npz({"odd": array})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a zip",
        write_npz(ARRAYS)[:-30],
        zipped({"a.npy": b""}),
        zipped({"a.npy": b"\x93NUMPY\x09\x00"}),
        zipped({"a.npy": npy()}, zipfile.ZIP_DEFLATED),
        zipped({"a.npy": npy()[:-1]}),
        zipped({"a.npy": npy() + b"\0"}),
        zipped({"a.npy": npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}")}),
        zipped({"a.npy": npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}")}),
        zipped({"a.npy": npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -2)}")}),
        zipped({"a.npy": npy(header="{'descr': '<f8', 'fortran_order': True, 'shape': (2, 2)}")}),
        zipped({"a.npy": npy(header="{'descr': '|O', 'fortran_order': False, 'shape': (4,)}")}),
        zipped({"a.npy": npy(header="__import__('os').system('true')")}),
        zipped({f"{i}.npy": npy() for i in range(65)}),
        zipped({"a.npy": npy(), "a": npy()}),
        overlapping(64),
        *(
            zipped({"a.npy": npy(header=header)})
            for header in (
                "{'descr': (",
                "{[]:1}",
                "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
                "{'descr': (), 'fortran_order': False, 'shape': (4,)}",
                "{'descr': 'f8,(', 'fortran_order': False, 'shape': (4,)}",
                "-" * 100 + "1",
            )
        ),
    ],
)
def test_invalid_files_are_refused(data):
    with pytest.raises(ValueError, match="."):
        read_npz(data)


@given(st.binary(max_size=120))
def test_any_header_is_read_or_raises_value_error(header):
    whole = npy()
    with contextlib.suppress(ValueError):
        read_npz(zipped({"a.npy": whole[:10] + header.ljust(118)[:118] + whole[128:]}))


@given(st.integers(0, len(write_npz(ARRAYS)) - 1), st.binary(max_size=4), st.integers(0, 8))
def test_a_damaged_file_is_read_or_raises_value_error(at, new, cut):
    data = write_npz(ARRAYS)
    try:
        read_npz(data[:at] + new + data[at + cut :])
    except ValueError:
        return
