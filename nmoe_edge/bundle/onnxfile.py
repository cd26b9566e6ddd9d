"""What an ONNX file says of itself, read without the onnx package.

A device must know before it opens a model whether a tensor lives outside the file (a path to somewhere else), and
which opset and IR version its runtime has to understand. So this walks the few protobuf fields that say so. It knows
nothing of operators, and trusts no length that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 64
"""Messages inside messages: a branch of an If adds three, and real models have two or three such."""

_ORT_IDENTIFIER = b"ORTM"
"""Where it stands a runtime takes a file for its own format, whatever else the bytes could be read as."""

# Field numbers of onnx.proto, which protobuf promises never to change.
_IR_VERSION, _OPSET_IMPORT, _GRAPH = 1, 8, 7
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_TENSORS_INSIDE: dict[str, dict[int, str]] = {
    "model": {_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Kind of message -> its fields in which a tensor may lie, and the kind of each."""


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """What a device needs to know of a model before it opens it."""

    ir_version: int
    opset: int
    """Of the default domain."""
    external_data: bool
    """Whether a tensor lies outside the file."""


def read_onnx(data: bytes) -> OnnxFacts:
    """The facts of a serialized ModelProto; ValueError when it is none."""
    if data[4:8] == _ORT_IDENTIFIER:
        raise ValueError("a model in onnxruntime's own format, not ONNX")
    ir_version, graphs = 0, 0
    opsets: dict[str, int] = {}
    for field, value in _fields(memoryview(data)):
        if field == _IR_VERSION:
            ir_version = _number(value)
        elif field == _OPSET_IMPORT:
            domain, version = _opset(_bytes(value))
            opsets[domain] = version
        elif field == _GRAPH:
            graphs += 1
    if graphs != 1 or ir_version < 1 or "" not in opsets:
        raise ValueError("not an ONNX model")
    external = _is_external("model", memoryview(data), 0)
    return OnnxFacts(ir_version, opsets[""], external)


def _opset(data: memoryview) -> tuple[str, int]:
    domain, version = "", 0
    for field, value in _fields(data):
        if field == _OPSET_DOMAIN:
            domain = bytes(_bytes(value)).decode()
        elif field == _OPSET_VERSION:
            version = _number(value)
    return "" if domain == "ai.onnx" else domain, version


def _is_external(kind: str, data: memoryview, depth: int) -> bool:
    """Whether a tensor anywhere in this message lies outside the file."""
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested more than {MAX_DEPTH} deep")
    if kind == "tensor":
        # Either sign counts: a runtime that heeds only one of them would still leave the folder.
        return any(
            field == _TENSOR_EXTERNAL_DATA or (field == _TENSOR_DATA_LOCATION and _number(value) != 0)
            for field, value in _fields(data)
        )
    inside = _TENSORS_INSIDE[kind]
    return any(
        _is_external(inside[field], _bytes(value), depth + 1) for field, value in _fields(data) if field in inside
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one protobuf message: a number, or the bytes of what is length-delimited."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire_type = tag >> 3, tag & 7
        # Protobuf's own readers cut a tag to 32 bits: a longer one would be another field to them than to us.
        if field == 0 or tag >= 2**32:
            raise ValueError("not protobuf")
        if wire_type == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError("not protobuf")
        if size > len(data) - at:
            raise ValueError("cut short")
        yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not protobuf")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("not protobuf")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("not protobuf")
    return value
