"""Reading the facts of ONNX files, also of hostile ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe_edge.bundle.onnxfile import OnnxFacts, read_onnx


def field(number, payload):
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def number(number, value):
    return varint(number << 3) + varint(value)


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def model(graph, more=b""):
    """ModelProto: IR 8, opset 18."""
    return number(1, 8) + field(8, number(2, 18)) + field(7, graph) + more


OUTSIDE = number(14, 1)
ALSO_OUTSIDE = field(13, field(1, b"location") + field(2, b"../../etc/passwd"))
INSIDE = field(9, b"1234") + number(14, 0)


def test_the_facts_of_a_real_model_are_read(tiny_fleet):
    facts = read_onnx((tiny_fleet / "attic" / "extractor.onnx").read_bytes())
    assert facts == OnnxFacts(ir_version=8, opset=18, external_data=False)


def test_the_opset_is_the_one_of_the_default_domain():
    data = model(b"", field(8, field(1, b"com.microsoft") + number(2, 1)))
    assert read_onnx(data).opset == 18


def test_a_tag_of_more_than_32_bits_is_refused():
    long_tag = varint((5 << 3 | 2) | 1 << 32)
    with pytest.raises(ValueError, match="not protobuf"):
        read_onnx(model(long_tag + varint(len(OUTSIDE)) + OUTSIDE))


def test_a_model_in_onnxruntimes_own_format_is_refused():
    data = model(b"")
    assert read_onnx(data)
    with pytest.raises(ValueError, match="onnxruntime's own format"):
        read_onnx(data[:4] + b"ORTM" + data[8:])


@pytest.mark.parametrize("tensor", [OUTSIDE, ALSO_OUTSIDE])
@pytest.mark.parametrize(
    "where",
    [
        lambda t: model(field(5, t)),
        lambda t: model(field(5, INSIDE) + field(5, t)),
        lambda t: model(field(15, field(1, t))),
        lambda t: model(field(15, field(2, t))),
        lambda t: model(field(1, field(5, field(5, t)))),
        lambda t: model(field(1, field(5, field(10, t)))),
        lambda t: model(field(1, field(5, field(22, field(1, t))))),
        lambda t: model(field(1, field(5, field(23, field(2, t))))),
        lambda t: model(field(1, field(5, field(6, field(5, t))))),
        lambda t: model(field(1, field(5, field(11, field(1, field(5, field(5, t))))))),
        lambda t: model(b"", field(25, field(7, field(5, field(5, t))))),
        lambda t: model(b"", field(25, field(11, field(5, t)))),
        lambda t: model(b"", field(20, field(1, field(5, t)))),
        lambda t: model(b"", field(20, field(2, field(5, t)))),
    ],
    ids=[
        "initializer",
        "second initializer",
        "sparse values",
        "sparse indices",
        "constant",
        "constants",
        "sparse constant",
        "sparse constants",
        "branch",
        "branch of a branch",
        "function",
        "attribute of a function",
        "training",
        "training algorithm",
    ],
)
def test_an_external_tensor_is_found_in_every_field_that_can_contain_one(where, tensor):
    assert read_onnx(where(tensor)).external_data
    assert not read_onnx(where(INSIDE)).external_data


def nested(depth):
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return model(graph)


def test_graphs_nested_too_deep_are_refused():
    assert read_onnx(nested(10)).opset == 18
    with pytest.raises(ValueError, match="nested"):
        read_onnx(nested(400))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        number(1, 8) + field(8, number(2, 18)),
        field(8, number(2, 18)) + field(7, b""),
        number(1, 8) + field(7, b""),
        model(b"") + field(7, b""),
        model(b"")[:-1],
        model(b"\xff" * 12),
        number(7, 3),
        b"\x3f",
        b"\x02\x00" + model(b""),
    ],
)
def test_data_that_is_not_a_model_is_refused(data):
    with pytest.raises(ValueError, match="."):
        read_onnx(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_raise_value_error(data):
    for candidate in (data, model(data)):
        try:
            assert isinstance(read_onnx(candidate), OnnxFacts)
        except ValueError:
            continue
