"""Files and arrays converted to input rows."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nmoe_edge.bundle.image import as_rows, range_warning, read_rows
from nmoe_edge.bundle.manifest import InputSpec
from nmoe_edge.common.npz import write_npz
from nmoe_edge.errors import InputError

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CHW = InputSpec("uint8", (3, 4, 6), "CHW", "exact", (0.0, 255.0))
HWC = InputSpec("uint8", (4, 6, 3), "HWC", "exact", (0.0, 255.0))
GREY = InputSpec("uint8", (1, 4, 6), "CHW", "exact", (0.0, 255.0))
UNIT = InputSpec("float32", (3, 4, 6), "CHW", "exact", (-1.0, 1.0))
NONE = InputSpec("float32", (5,), "none", "exact", (0.0, 1.0))


def spec(resize, height, width, dtype="uint8"):
    return InputSpec(dtype, (3, height, width), "CHW", resize, (0.0, 255.0))


def encoded(pixels=RGB, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def odd_npy(header):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def huge_png(width, height):
    """A PNG of a few bytes with a header that claims this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.fixture
def rows(tmp_path):
    def read(data, spec):
        path = tmp_path / "input"
        path.write_bytes(data)
        return read_rows(path, spec)

    return read


@pytest.fixture
def refused(rows):
    def read(data, spec):
        with pytest.raises(InputError) as error:
            rows(data, spec)
        assert "\n" not in str(error.value)
        assert "/input: " in str(error.value)
        return str(error.value)

    return read


def test_a_picture_is_one_row_with_its_channels_first(rows):
    found = rows(encoded(), CHW)
    assert found.dtype == np.uint8
    assert np.array_equal(found, RGB.transpose(2, 0, 1)[None])


def test_a_picture_is_one_row_with_its_channels_last(rows):
    assert np.array_equal(rows(encoded(), HWC), RGB[None])


def test_a_jpeg_is_decoded_with_small_errors(rows):
    smooth = np.linspace(0, 255, 16 * 16).reshape(16, 16, 1).repeat(3, 2).astype(np.uint8)
    found = rows(encoded(smooth, "JPEG", quality=95), spec("exact", 16, 16))
    assert found.shape == (1, 3, 16, 16)
    assert np.abs(found[0].astype(int) - smooth.transpose(2, 0, 1)).max() < 12


def test_a_grey_picture_has_three_equal_channels_for_a_colour_model(rows):
    assert np.array_equal(rows(encoded(RGB[:, :, 0]), CHW), np.tile(RGB[:, :, 0], (1, 3, 1, 1)))


def test_a_colour_picture_is_converted_to_brightness_for_a_grey_model(rows):
    found = rows(encoded(), GREY)
    assert found.shape == (1, 1, 4, 6)
    assert np.abs(found[0, 0] - RGB @ np.array([0.299, 0.587, 0.114])).max() < 1


def test_transparency_is_ignored(rows):
    clear = np.concatenate([RGB, np.full((4, 6, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(rows(encoded(clear), HWC), RGB[None])


def test_a_palette_with_transparent_colours_is_read_without_a_warning(rows):
    stream = io.BytesIO()
    Image.fromarray(RGB).quantize(16).save(stream, "PNG", transparency=bytes(range(16)))
    assert rows(stream.getvalue(), HWC).shape == (1, 4, 6, 3)


def test_a_float_model_gets_pixels_scaled_to_the_range_of_the_manifest(rows):
    found = rows(encoded(), UNIT)
    assert found.dtype == np.float32
    assert found == pytest.approx(RGB.transpose(2, 0, 1)[None] / 127.5 - 1, abs=1e-6)


def test_another_size_is_refused_with_resize_exact(refused):
    assert "6 × 4 pixels, not 4 × 6" in refused(encoded(), spec("exact", 6, 4))


def test_resize_stretch_keeps_every_edge(rows):
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 200
    found = rows(encoded(halves), spec("stretch", 8, 8))
    assert found.shape == (1, 3, 8, 8)
    assert (found[0, 0, :, 0].max(), found[0, 0, :, -1].min()) == (0, 200)


def test_resize_crop_keeps_the_centre(rows):
    sides = np.zeros((10, 40, 3), np.uint8)
    sides[:, 10:30] = 200
    assert rows(encoded(sides), spec("crop", 8, 8)).min() == 200


def test_a_picture_is_refused_by_a_model_without_image_input(refused):
    assert "as .npy or .npz" in refused(encoded(), NONE)


def test_a_picture_is_refused_by_a_model_with_two_channels(refused):
    assert "2 channels" in refused(encoded(), InputSpec("uint8", (2, 4, 6), "CHW", "exact", (0.0, 255.0)))


@pytest.mark.parametrize("many", [1, 3])
def test_an_npy_can_contain_any_number_of_rows(rows, many):
    array = np.random.default_rng(1).random((many, 5), np.float32)
    assert np.array_equal(rows(npy(array), NONE), array)


def test_an_npy_of_one_row_needs_no_batch_dimension(rows):
    assert np.array_equal(rows(npy(np.arange(5, dtype=np.float32)), NONE), [np.arange(5)])


def test_an_array_in_fortran_order_gives_the_same_rows(rows):
    array = np.asfortranarray(np.arange(15, dtype=np.float32).reshape(3, 5))
    assert np.array_equal(rows(npy(array), NONE), array)


def test_an_npz_with_one_array_is_read(rows):
    assert np.array_equal(rows(write_npz({"anything": RGB[None]}), HWC), RGB[None])


def test_an_npz_with_other_arrays_needs_one_named_inputs(rows):
    data = write_npz({"labels": np.zeros(1, np.int64), "inputs": RGB[None]})
    assert np.array_equal(rows(data, HWC), RGB[None])


def test_an_npz_without_inputs_is_refused_with_the_names_of_its_arrays(refused):
    text = refused(write_npz({"labels": np.zeros(1, np.int64), "images": RGB[None]}), HWC)
    assert "images, labels" in text


def test_an_empty_npz_is_refused(refused):
    assert "one array" in refused(write_npz({}), HWC)


@pytest.mark.parametrize(
    "array",
    [np.zeros(shape, np.float32) for shape in (4, (2, 6), (1, 1, 5), (0, 5), ())],
    ids=["one row too narrow", "rows too wide", "too deep", "no rows", "no dimensions"],
)
def test_another_shape_is_refused(refused, array):
    assert "is not rows of [5]" in refused(npy(array), NONE)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros(5, np.complex64), NONE),
        (np.zeros((4, 6, 3), np.float32), HWC),
        (np.zeros((4, 6, 3), np.int64), HWC),
        (np.array(["a"] * 5), NONE),
    ],
)
def test_a_dtype_that_cannot_be_converted_safely_is_refused(refused, array, expected):
    assert f"cannot be converted safely; expected {expected.dtype}" in refused(npy(array), expected)


def test_a_dtype_that_can_be_converted_safely_is_converted():
    assert as_rows(np.arange(5), NONE).dtype == np.float32
    assert as_rows(np.full((4, 6, 3), 255, np.uint16), HWC).dtype == np.uint8
    assert as_rows(np.arange(5, dtype=np.float64), NONE).dtype == np.float32


def test_integers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="uint8 cannot hold"):
        as_rows(np.full((4, 6, 3), 256, np.uint16), HWC)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_infinity_and_values_over_float32_are_refused(refused, odd):
    assert "NaN" in refused(npy(np.array([0, 0, odd, 0, 0])), NONE)


class Pickled:
    """Sets `loaded` when it is unpickled."""

    loaded = False

    def __reduce__(self):
        return (setattr, (Pickled, "loaded", True))


def test_objects_in_an_npy_are_never_unpickled(refused):
    refused(npy(np.array([Pickled()] * 5), allow_pickle=True), NONE)
    assert not Pickled.loaded


def test_objects_in_an_npz_are_never_unpickled(refused):
    stream = io.BytesIO()
    np.savez(stream, inputs=np.array([Pickled()] * 5))
    refused(stream.getvalue(), NONE)
    assert not Pickled.loaded


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999999,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': 'f8,(', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': (",
        "{[]:1}",
        "-" * 100 + "1",
        "(" * 100,
        "__import__('os').abort()",
    ],
)
def test_an_npy_with_an_invalid_header_is_refused(refused, header):
    refused(odd_npy(header), NONE)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"PK\x03\x04", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8"])
def test_a_file_of_unknown_format_is_refused(refused, data):
    refused(data, HWC)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "npy", "npz"])
def test_a_truncated_file_is_refused(refused, kind):
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    large = InputSpec("uint8", (64, 64, 3), "HWC", "exact", (0.0, 255.0))
    if kind == "npy":
        whole = npy(noise)
    elif kind == "npz":
        whole = write_npz({"inputs": noise})
    else:
        whole = encoded(noise, kind)
    for share in (0.1, 0.5, 0.9):
        refused(whole[: int(share * len(whole))], large)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (10_000, 10_000), (60_000, 60_000)])
def test_a_small_file_with_too_many_pixels_is_refused_before_it_is_decoded(refused, width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert "pixels" in refused(huge_png(width, height), spec("stretch", 8, 8))


def test_a_file_over_the_size_limit_is_refused(tmp_path):
    path = tmp_path / "input"
    path.touch()
    os.truncate(path, 256 * 1024 * 1024 + 1)
    with pytest.raises(InputError, match="more than 268435456 bytes"):
        read_rows(path, HWC)


def test_a_missing_file_or_a_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_rows(tmp_path / "nothing", HWC)
    with pytest.raises(InputError, match="directory"):
        read_rows(str(tmp_path), HWC)


WHOLE = {"PNG": encoded(), "JPEG": encoded(kind="JPEG"), "BMP": encoded(kind="BMP"), "npy": npy(RGB)}


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 200), st.binary(max_size=4), st.integers(0, 8))
def test_a_damaged_file_is_read_or_raises_input_error(tmp_path_factory, kind, at, new, cut):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(WHOLE[kind][:at] + new + WHOLE[kind][at + cut :])
    with contextlib.suppress(InputError):
        assert read_rows(path, spec("stretch", 4, 6)).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ((0.0, 1.0), ""),
        ((-0.01, 1.005), ""),
        ((0.0, 16.0), "values from 0 to 16; the model was calibrated on 0 to 1"),
        ((-5.0, 0.5), "values from -5 to 0.5; the model was calibrated on 0 to 1"),
    ],
)
def test_values_outside_the_calibrated_range_give_a_warning(values, warning):
    narrow = InputSpec("float32", (2,), "none", "exact", (0.0, 1.000001))
    assert range_warning(np.array([values], np.float32), narrow) == warning
