from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.tensor import DTYPES, MAX_SCALE, Tensor, payload_bytes

finite_rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(finite_rows)
def test_float32_rows_are_restored_exactly(rows):
    assert np.array_equal(Tensor.pack(rows, "float32").unpack(), rows)


@given(finite_rows)
def test_float16_rows_are_restored_rounded(rows):
    back = Tensor.pack(rows, "float16").unpack()
    assert back.dtype == np.float32
    assert np.array_equal(back, rows.astype(np.float16).astype(np.float32))


@given(finite_rows)
def test_int8_rows_are_restored_within_half_a_step_of_their_own_scale(rows):
    back = Tensor.pack(rows, "int8").unpack()
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - rows) <= step * 0.5001 + 1e-37).all()


def test_a_row_of_zeros_stays_zeros_in_int8():
    assert not Tensor.pack(np.zeros((2, 5), np.float32), "int8").unpack().any()


def test_a_large_row_does_not_reduce_the_precision_of_others_in_int8():
    rows = np.array([[1e-3, -1e-3], [1e3, -1e3]], np.float32)
    assert np.allclose(Tensor.pack(rows, "int8").unpack(), rows, rtol=5e-3)


@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (2, 3, 4, 5)), ("int64", (1, 7))])
def test_inputs_keep_their_dtype(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    back = Tensor.pack(array, dtype).unpack()
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_bytes_is_the_length_of_a_packed_array(dtype):
    array = np.ones((3, 5), DTYPES[dtype] if dtype != "int8" else np.float32)
    assert len(Tensor.pack(array, dtype).data) == payload_bytes(dtype, array.shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_values_that_are_not_finite_are_refused(dtype, bad):
    rows = np.ones((2, 3), np.float32)
    rows[1, 2] = bad
    with pytest.raises(LocalProtocolError):
        Tensor.pack(rows, dtype)


def test_a_value_too_large_for_float16_is_refused():
    with pytest.raises(LocalProtocolError, match="infinity"):
        Tensor.pack(np.full((1, 2), 1e6, np.float32), "float16")


def test_the_largest_scale_does_not_overflow():
    data = np.array([MAX_SCALE], "<f4").tobytes() + np.array([-128], "i1").tobytes()
    assert np.isfinite(Tensor("int8", (1, 1), data).unpack()).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (np.float64, "uint8"),
        (np.int64, "uint8"),
        (np.uint16, "uint8"),
        (np.uint64, "int64"),
        (np.complex64, "float32"),
        (np.complex64, "int8"),
    ],
)
def test_a_lossy_conversion_is_refused(kind, dtype):
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        Tensor.pack(np.ones((1, 2), kind), dtype)


def test_the_smallest_numbers_keep_their_sign_in_int8():
    back = Tensor.pack(np.array([[-3e-43, 3e-43]], np.float32), "int8").unpack()
    assert back[0, 0] <= 0 <= back[0, 1]


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (1, 1, 1, 1, 1, 1)])
def test_a_shape_that_is_not_rows_is_refused(shape):
    with pytest.raises(LocalProtocolError, match="shape"):
        Tensor.pack(np.zeros(shape, np.float32), "float32")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(LocalProtocolError, match="bfloat16"):
        Tensor("bfloat16", (1, 1), b"xx")
    with pytest.raises(LocalProtocolError, match="bfloat16"):
        Tensor.pack(np.zeros((1, 1), np.float32), "bfloat16")
