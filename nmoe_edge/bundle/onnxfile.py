"""Reads the few facts of an ONNX file that a device checks before opening it, without the onnx package.

Those are the opset, the IR version, and whether a tensor is stored outside the file (its path could point anywhere).
The parser walks the protobuf fields that contain these facts. It knows no operators and checks every length it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 64
"""Maximum nesting of messages. A branch of an If adds three; real models nest two or three branches."""

_ORT_IDENTIFIER = b"ORTM"
"""At bytes 4 to 8 it makes onnxruntime read the file as its own format, even if the bytes are also valid ONNX."""

# Field numbers of onnx.proto; protobuf guarantees that they never change.
_IR_VERSION = 1
_GRAPH = 7
_OPSET_IMPORT = 8
_OPSET_DOMAIN = 1
_OPSET_VERSION = 2
_TENSOR_EXTERNAL_DATA = 13
_TENSOR_DATA_LOCATION = 14
_TENSORS_INSIDE: dict[str, dict[int, str]] = {
    "model": {_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Kind of message -> {field that can contain a tensor: kind of message in that field}."""


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """Facts that a device checks before it opens a model."""

    ir_version: int
    opset: int
    """Opset version of the default domain."""
    external_data: bool
    """Whether a tensor is stored outside the file."""


def read_onnx(data: bytes) -> OnnxFacts:
    """Read the facts of a serialized ModelProto; ValueError for anything else."""
    if data[4:8] == _ORT_IDENTIFIER:
        raise ValueError("a model in onnxruntime's own format, not ONNX")
    ir_version = 0
    graphs = 0
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
    """Domain and version of an OperatorSetIdProto."""
    domain = ""
    version = 0
    for field, value in _fields(data):
        if field == _OPSET_DOMAIN:
            domain = bytes(_bytes(value)).decode()
        elif field == _OPSET_VERSION:
            version = _number(value)
    return "" if domain == "ai.onnx" else domain, version


def _is_external(kind: str, data: memoryview, depth: int) -> bool:
    """Whether any tensor in this message is stored outside the file."""
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested more than {MAX_DEPTH} deep")
    if kind == "tensor":
        # Either field counts: a runtime that looks at one of them only would still open the outside file.
        return any(
            field == _TENSOR_EXTERNAL_DATA or (field == _TENSOR_DATA_LOCATION and _number(value) != 0)
            for field, value in _fields(data)
        )
    inside = _TENSORS_INSIDE[kind]
    return any(
        _is_external(inside[field], _bytes(value), depth + 1) for field, value in _fields(data) if field in inside
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of one protobuf message as (field number, integer or bytes)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire_type = tag >> 3, tag & 7
        # Protobuf libraries truncate a tag to 32 bits, so they would read a longer tag as another field than we do.
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
    """The variable-length integer at position `at`, and the position after it."""
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
