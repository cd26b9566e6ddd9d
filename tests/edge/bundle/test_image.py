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

from nmoe_edge.bundle.image import as_rows, outside, read_rows
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
    """A PNG of a few bytes that says it is so large."""

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


def test_or_with_its_channels_last(rows):
    assert np.array_equal(rows(encoded(), HWC), RGB[None])


def test_a_jpeg_is_nearly_what_it_was(rows):
    smooth = np.linspace(0, 255, 16 * 16).reshape(16, 16, 1).repeat(3, 2).astype(np.uint8)
    found = rows(encoded(smooth, "JPEG", quality=95), spec("exact", 16, 16))
    assert found.shape == (1, 3, 16, 16)
    assert np.abs(found[0].astype(int) - smooth.transpose(2, 0, 1)).max() < 12


def test_a_grey_picture_is_grey_to_a_model_of_colours(rows):
    assert np.array_equal(rows(encoded(RGB[:, :, 0]), CHW), np.tile(RGB[:, :, 0], (1, 3, 1, 1)))


def test_a_coloured_picture_is_brightness_to_a_grey_model(rows):
    found = rows(encoded(), GREY)
    assert found.shape == (1, 1, 4, 6)
    assert np.abs(found[0, 0] - RGB @ np.array([0.299, 0.587, 0.114])).max() < 1


def test_what_shines_through_is_of_no_matter(rows):
    clear = np.concatenate([RGB, np.full((4, 6, 1), 7, np.uint8)], axis=2)
    assert np.array_equal(rows(encoded(clear), HWC), RGB[None])


def test_a_palette_with_clear_colours_is_read_without_a_warning(rows):
    stream = io.BytesIO()
    Image.fromarray(RGB).quantize(16).save(stream, "PNG", transparency=bytes(range(16)))
    assert rows(stream.getvalue(), HWC).shape == (1, 4, 6, 3)


def test_floats_stretch_over_the_range_of_the_manifest(rows):
    found = rows(encoded(), UNIT)
    assert found.dtype == np.float32
    assert found == pytest.approx(RGB.transpose(2, 0, 1)[None] / 127.5 - 1, abs=1e-6)


def test_another_size_is_refused_where_it_has_to_be_exact(refused):
    assert "6 × 4 pixels, not 4 × 6" in refused(encoded(), spec("exact", 6, 4))


def test_stretching_keeps_every_edge(rows):
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 200
    found = rows(encoded(halves), spec("stretch", 8, 8))
    assert found.shape == (1, 3, 8, 8)
    assert (found[0, 0, :, 0].max(), found[0, 0, :, -1].min()) == (0, 200)


def test_cropping_keeps_the_centre_alone(rows):
    sides = np.zeros((10, 40, 3), np.uint8)
    sides[:, 10:30] = 200
    assert rows(encoded(sides), spec("crop", 8, 8)).min() == 200


def test_a_picture_is_not_taken_by_a_model_of_other_things(refused):
    assert "as .npy or .npz" in refused(encoded(), NONE)


def test_a_picture_is_not_taken_by_a_model_of_other_channels(refused):
    assert "2 channels" in refused(encoded(), InputSpec("uint8", (2, 4, 6), "CHW", "exact", (0.0, 255.0)))


@pytest.mark.parametrize("many", [1, 3])
def test_an_npy_holds_as_many_rows_as_it_has(rows, many):
    array = np.random.default_rng(1).random((many, 5), np.float32)
    assert np.array_equal(rows(npy(array), NONE), array)


def test_an_npy_of_one_row_needs_no_dimension_for_rows(rows):
    assert np.array_equal(rows(npy(np.arange(5, dtype=np.float32)), NONE), [np.arange(5)])


def test_an_array_in_fortran_order_is_the_same_rows(rows):
    array = np.asfortranarray(np.arange(15, dtype=np.float32).reshape(3, 5))
    assert np.array_equal(rows(npy(array), NONE), array)


def test_an_npz_holds_one_array(rows):
    assert np.array_equal(rows(write_npz({"anything": RGB[None]}), HWC), RGB[None])


def test_or_one_called_inputs_beside_others(rows):
    data = write_npz({"labels": np.zeros(1, np.int64), "inputs": RGB[None]})
    assert np.array_equal(rows(data, HWC), RGB[None])


def test_an_npz_of_several_others_is_refused_by_their_names(refused):
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
    ("array", "due"),
    [
        (np.zeros(5, np.complex64), NONE),
        (np.zeros((4, 6, 3), np.float32), HWC),
        (np.zeros((4, 6, 3), np.int64), HWC),
        (np.array(["a"] * 5), NONE),
    ],
)
def test_other_numbers_are_refused(refused, array, due):
    assert f"are not the {due.dtype} that is due" in refused(npy(array), due)


def test_numbers_that_are_safe_to_convert_are_converted():
    assert as_rows(np.arange(5), NONE).dtype == np.float32
    assert as_rows(np.full((4, 6, 3), 255, np.uint16), HWC).dtype == np.uint8
    assert as_rows(np.arange(5, dtype=np.float64), NONE).dtype == np.float32


def test_whole_numbers_that_the_dtype_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="uint8 cannot hold"):
        as_rows(np.full((4, 6, 3), 256, np.uint16), HWC)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_infinity_and_what_float32_has_no_room_for_are_refused(refused, odd):
    assert "NaN" in refused(npy(np.array([0, 0, odd, 0, 0])), NONE)


class Told:
    """Says so when it is unpickled."""

    seen = False

    def __reduce__(self):
        return (setattr, (Told, "seen", True))


def test_objects_in_an_npy_are_never_unpickled(refused):
    refused(npy(np.array([Told()] * 5), allow_pickle=True), NONE)
    assert not Told.seen


def test_objects_in_an_npz_are_never_unpickled(refused):
    stream = io.BytesIO()
    np.savez(stream, inputs=np.array([Told()] * 5))
    refused(stream.getvalue(), NONE)
    assert not Told.seen


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
def test_an_npy_with_an_odd_header_is_refused(refused, header):
    refused(odd_npy(header), NONE)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"PK\x03\x04", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8"])
def test_what_is_nothing_that_is_known_is_refused(refused, data):
    refused(data, HWC)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "npy", "npz"])
def test_a_file_that_was_cut_off_is_refused(refused, kind):
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    due = InputSpec("uint8", (64, 64, 3), "HWC", "exact", (0.0, 255.0))
    whole = {"npy": npy, "npz": lambda array: write_npz({"inputs": array})}.get(kind, lambda a: encoded(a, kind))(noise)
    for share in (0.1, 0.5, 0.9):
        refused(whole[: int(share * len(whole))], due)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (10_000, 10_000), (60_000, 60_000)])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_unfolded(refused, width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("unfolded"))
    assert "pixels" in refused(huge_png(width, height), spec("stretch", 8, 8))


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "input"
    path.touch()
    os.truncate(path, 256 * 1024 * 1024 + 1)
    with pytest.raises(InputError, match="more than 268435456 bytes"):
        read_rows(path, HWC)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_rows(tmp_path / "nothing", HWC)
    with pytest.raises(InputError, match="directory"):
        read_rows(str(tmp_path), HWC)


WHOLE = {"PNG": encoded(), "JPEG": encoded(kind="JPEG"), "BMP": encoded(kind="BMP"), "npy": npy(RGB)}


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 200), st.binary(max_size=4), st.integers(0, 8))
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path_factory, kind, at, new, cut):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(WHOLE[kind][:at] + new + WHOLE[kind][at + cut :])
    with contextlib.suppress(InputError):
        assert read_rows(path, spec("stretch", 4, 6)).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((0.0, 1.0), ""),
        ((-0.01, 1.005), ""),
        ((0.0, 16.0), "values from 0 to 16; the model was calibrated on 0 to 1"),
        ((-5.0, 0.5), "values from -5 to 0.5; the model was calibrated on 0 to 1"),
    ],
)
def test_values_that_the_model_was_not_calibrated_on_are_told_of(values, told):
    narrow = InputSpec("float32", (2,), "none", "exact", (0.0, 1.000001))
    assert outside(np.array([values], np.float32), narrow) == told
