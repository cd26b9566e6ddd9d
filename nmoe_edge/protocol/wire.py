"""Encodes messages as frames and decodes frames, in the format that WIRE.md describes.

A message is a header of 64 bytes and, for most kinds, a payload. Whatever arrives, `decode` returns a valid message or
raises RemoteProtocolError, and nothing else. It knows no socket, so both ends are tested in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from nmoe_edge.common.limits import MAX_ANSWERED
from nmoe_edge.common.schema import parse_json
from nmoe_edge.errors import LocalProtocolError, RemoteProtocolError
from nmoe_edge.protocol.messages import (
    PROTOCOL,
    TRUNK_BYTES,
    Answer,
    Ask,
    Hello,
    Infer,
    Leave,
    Message,
    Ping,
    Pong,
    Refuse,
    Report,
    Result,
    RowAnswer,
    Status,
    Welcome,
)
from nmoe_edge.protocol.tensor import MAX_DIMS, Tensor

Frames = tuple[bytes, ...]
Written = tuple[int, int, Sequence[int], bytes | None]
"""What a payload writer returns: dtype code, rows and dims for the header, and the payload."""

MAGIC = b"nM"
HEADER = struct.Struct("<2s 4B H 2Q 2I 16s 4I")
"""The fields of Header, little-endian: 64 bytes."""

_DTYPE_CODES = {"uint8": 1, "int8": 2, "int64": 3, "float16": 4, "float32": 5}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}
_NO_EXPERT = 0xFFFF
"""Padding for a row that names fewer experts than another of the same Result."""


@dataclass(frozen=True, slots=True)
class Caps:
    """The largest message that a device reads. One over a cap is refused before its payload is touched."""

    rows: int = 4096
    row_values: int = 4 * 1024 * 1024
    """Numbers in one row: an image of 1024 × 1024 × 3 fits."""
    payload_bytes: int = 32 * 1024 * 1024
    """A batch of ten such images fits. A device with little memory may lower it."""
    text_bytes: int = 64 * 1024
    """Of JSON and of text."""


DEFAULT_CAPS = Caps()


class Header(NamedTuple):
    """The fixed part of every message. Fields that a kind does not use are sent as zero and not read."""

    magic: bytes = MAGIC
    version: int = PROTOCOL
    kind: int = 0
    dtype: int = 0
    """Of the tensor in the payload, as in _DTYPE_CODES; 0 without a tensor."""
    code: int = 0
    """A Reason."""
    expert: int = 0
    request: int = 0
    trace: int = 0
    time: int = 0
    """Ask, Infer: the budget left, in ms. Answer, Result: the time taken, in µs."""
    rows: int = 0
    trunk: bytes = bytes(TRUNK_BYTES)
    dims: tuple[int, ...] = (0,) * MAX_DIMS
    """Dimensions of one row, then zeros. In a Result: outputs, answering experts and missing experts per row."""


_DTYPE = Header._fields.index("dtype")
_ROWS = Header._fields.index("rows")
_DIMS = Header._fields.index("dims")


def encode(message: Message) -> Frames:
    """The frames of a message: its header and, for kinds that have one, its payload."""
    codec = _BY_CLASS[type(message)]
    dtype, rows, dims, payload = codec.layout.body.write(message, codec.layout.carried)
    values = codec.blank.copy()
    for index, attribute in codec.fills:
        values[index] = getattr(message, attribute)
    values[_DTYPE] = dtype
    values[_ROWS] = rows
    values[_DIMS : _DIMS + len(dims)] = dims
    header = HEADER.pack(*values)
    return (header,) if payload is None else (header, payload)


def decode(frames: Sequence[bytes], caps: Caps = DEFAULT_CAPS) -> Message:
    """The message in these frames. RemoteProtocolError otherwise, with the request's number where it could be read."""
    if not 1 <= len(frames) <= 2:
        raise RemoteProtocolError(f"a message has one frame or two, not {len(frames)}")
    if len(frames[0]) != HEADER.size:
        raise RemoteProtocolError(f"a header has {HEADER.size} bytes, not {len(frames[0])}")
    values = HEADER.unpack(frames[0])
    header = Header._make((*values[:_DIMS], values[_DIMS:]))
    if header.magic != MAGIC:
        raise RemoteProtocolError("no magic bytes: the other side does not speak this protocol")
    if header.version != PROTOCOL:
        raise RemoteProtocolError(f"the other side speaks version {header.version}, this device {PROTOCOL}")
    codec = _BY_KIND.get(header.kind)
    if codec is None:
        raise RemoteProtocolError(f"kind {header.kind} is not one of {sorted(_BY_KIND)}")
    payload = frames[1] if len(frames) == 2 else b""
    try:
        if len(payload) > caps.payload_bytes:
            raise RemoteProtocolError(f"{len(payload)} bytes exceed the cap of {caps.payload_bytes}")
        carried = codec.layout.body.read(header, payload, caps, codec.layout.carried)
        return codec.make(*codec.arrange((*header, *carried)))
    except (RemoteProtocolError, LocalProtocolError) as error:
        # The message rejected itself (LocalProtocolError), but its bytes came from the other side.
        request = header.request if "request" in codec.layout.header else None
        raise RemoteProtocolError(str(error), request) from error


def peek_infer(frames: Sequence[bytes]) -> tuple[int, int] | None:
    """Request number and budget in ms of an Infer, read from its header alone; None for other kinds.

    For a device under overload, which must refuse at almost no cost.
    """
    if len(frames) != 2 or len(frames[0]) != HEADER.size:
        return None
    magic, version, kind, _, _, _, request, _, budget_ms, *_ = HEADER.unpack(frames[0])
    return (request, budget_ms) if (magic, version, kind) == (MAGIC, PROTOCOL, LAYOUTS[Infer].kind) else None


class Body(NamedTuple):
    """How one form of payload is written and read."""

    name: str
    write: Callable[[Any, tuple[str, ...]], Written]
    """(message, the attributes in the payload) -> header values and payload"""
    read: Callable[[Header, bytes, Caps, tuple[str, ...]], tuple[Any, ...]]
    """(header, payload, caps, the attributes in the payload) -> their values"""


def _write_nothing(_message: Any, _carried: tuple[str, ...]) -> Written:
    return 0, 0, (), None


def _read_nothing(_header: Header, payload: bytes, _caps: Caps, _carried: tuple[str, ...]) -> tuple[()]:
    if payload:
        raise RemoteProtocolError(f"{len(payload)} bytes of payload, expected none")
    return ()


def _write_tensor(message: Any, carried: tuple[str, ...]) -> Written:
    tensor: Tensor = getattr(message, carried[0])
    rows, *dims = tensor.shape
    return _DTYPE_CODES[tensor.dtype], rows, dims, tensor.data


def _read_tensor(header: Header, payload: bytes, caps: Caps, _carried: tuple[str, ...]) -> tuple[Tensor]:
    dtype = _DTYPE_NAMES.get(header.dtype)
    if dtype is None:
        raise RemoteProtocolError(f"dtype {header.dtype} is not one of {sorted(_DTYPE_NAMES)}")
    dims = header.dims[: header.dims.index(0)] if 0 in header.dims else header.dims
    if any(header.dims[len(dims) :]):
        raise RemoteProtocolError(f"dims {header.dims} are not a shape: a number follows a zero")
    _check_counts(header.rows, math.prod(dims), caps)
    # Tensor checks that the length fits the shape before it reads the data.
    return (Tensor(dtype, (header.rows, *dims), payload),)


def _check_counts(rows: int, row_values: int, caps: Caps) -> None:
    if not 1 <= rows <= caps.rows:
        raise RemoteProtocolError(f"{rows} rows are not in 1..{caps.rows}")
    if not 1 <= row_values <= caps.row_values:
        raise RemoteProtocolError(f"{row_values} values in a row are not in 1..{caps.row_values}")


def _write_text(message: Any, carried: tuple[str, ...]) -> Written:
    return 0, 0, (), getattr(message, carried[0]).encode()


def _read_text(_header: Header, payload: bytes, caps: Caps, _carried: tuple[str, ...]) -> tuple[str]:
    if len(payload) > caps.text_bytes:
        raise RemoteProtocolError(f"{len(payload)} bytes of text exceed the cap of {caps.text_bytes}")
    try:
        return (payload.decode(),)
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("the text is not UTF-8") from error


def _write_json(message: Any, carried: tuple[str, ...]) -> Written:
    content = {attribute: getattr(message, attribute) for attribute in carried}
    return 0, 0, (), json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _read_json(header: Header, payload: bytes, caps: Caps, carried: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        content = parse_json(*_read_text(header, payload, caps, carried))
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from error
    if not isinstance(content, dict) or not content.keys() >= set(carried):
        raise RemoteProtocolError(f"the payload must be a JSON object with the keys {', '.join(carried)}")
    # Unknown keys are ignored: a greeting must be readable before the two sides have agreed on a version.
    values = [content[key] for key in carried]
    return tuple([tuple(value) if isinstance(value, list) else value for value in values])


def _write_result(message: Result, _carried: tuple[str, ...]) -> Written:
    outputs, rows = message.outputs, message.rows
    answered = max(len(row.experts) for row in rows)
    missing = max(len(row.missing) for row in rows)
    parts = (
        outputs.data,  # (rows, outputs)
        _pad([row.weights for row in rows], answered, 0, "<f4"),  # (rows, answered)
        _pad([row.experts for row in rows], answered, _NO_EXPERT, "<u2"),  # (rows, answered)
        _pad([row.missing for row in rows], missing, _NO_EXPERT, "<u2"),  # (rows, missing)
    )
    dims = (outputs.shape[1], answered, missing)
    return _DTYPE_CODES["float32"], outputs.rows, dims, b"".join(parts)


def _pad(rows: list[tuple[Any, ...]], width: int, fill: int, dtype: str) -> bytes:
    """Rows of unequal length as the bytes of one array; short ones are padded with `fill`."""
    return np.array([(*row, *[fill] * (width - len(row))) for row in rows], dtype).tobytes()


def _read_result(
    header: Header, payload: bytes, caps: Caps, _carried: tuple[str, ...]
) -> tuple[Tensor, tuple[RowAnswer, ...]]:
    n = header.rows
    outputs, answered, missing, rest = header.dims
    if header.dtype != _DTYPE_CODES["float32"] or rest or max(answered, missing) > MAX_ANSWERED:
        raise RemoteProtocolError(f"a result cannot have dtype {header.dtype} and dims {header.dims}")
    _check_counts(n, outputs, caps)
    expected = n * (4 * outputs + (4 + 2) * answered + 2 * missing)
    if len(payload) != expected:
        raise RemoteProtocolError(f"{len(payload)} bytes for a result, which needs {expected}")
    weights_at = 4 * n * outputs
    experts_at = weights_at + 4 * n * answered
    absent_at = experts_at + 2 * n * answered
    weights = np.frombuffer(payload, "<f4", n * answered, weights_at).reshape(n, answered)
    experts = np.frombuffer(payload, "<u2", n * answered, experts_at).reshape(n, answered)
    absent = np.frombuffer(payload, "<u2", n * missing, absent_at).reshape(n, missing)
    rows = tuple(map(_read_row, experts.tolist(), weights.tolist(), absent.tolist()))
    return Tensor("float32", (n, outputs), payload[:weights_at]), rows


def _read_row(experts: list[int], weights: list[float], missing: list[int]) -> RowAnswer:
    named = _unpad(experts)
    if any(weights[len(named) :]):
        raise RemoteProtocolError("a weight without its expert")
    return RowAnswer(named, tuple(weights[: len(named)]), _unpad(missing))


def _unpad(experts: list[int]) -> tuple[int, ...]:
    end = experts.index(_NO_EXPERT) if _NO_EXPERT in experts else len(experts)
    if any(expert != _NO_EXPERT for expert in experts[end:]):
        raise RemoteProtocolError("an expert after the end of its row")
    return tuple(experts[:end])


_NOTHING = Body("nothing", _write_nothing, _read_nothing)
_TENSOR = Body("tensor", _write_tensor, _read_tensor)
_TEXT = Body("text", _write_text, _read_text)
_JSON = Body("JSON", _write_json, _read_json)
_RESULT = Body("result", _write_result, _read_result)


class Layout(NamedTuple):
    """The wire format of one kind of message."""

    kind: int
    header: dict[str, str]
    """Attribute of the message -> field of the header."""
    body: Body = _NOTHING
    carried: tuple[str, ...] = ()
    """Attributes of the message that are in the payload."""


_IDENTITY = {"expert": "expert", "trunk": "trunk"}
_REQUEST = {"request": "request"}
_BUDGET = {"request": "request", "trace": "trace", "budget_ms": "time"}

LAYOUTS: dict[type[Message], Layout] = {
    Hello: Layout(1, _IDENTITY, _JSON, ("bundle", "capabilities", "device", "protocols")),
    Welcome: Layout(2, _IDENTITY, _JSON, ("bundle", "capabilities", "device", "protocol")),
    Ask: Layout(3, _BUDGET | _IDENTITY, _TENSOR, ("latents",)),
    Answer: Layout(4, _REQUEST | {"expert": "expert", "compute_us": "time"}, _TENSOR, ("outputs",)),
    Refuse: Layout(5, _REQUEST | {"reason": "code"}, _TEXT, ("detail",)),
    Ping: Layout(6, _REQUEST),
    Pong: Layout(7, _REQUEST),
    Leave: Layout(8, {}, _TEXT, ("device",)),
    Status: Layout(9, _REQUEST),
    Report: Layout(10, _REQUEST, _TEXT, ("facts",)),
    Infer: Layout(11, _BUDGET, _TENSOR, ("inputs",)),
    Result: Layout(12, _REQUEST | {"elapsed_us": "time"}, _RESULT, ("outputs", "rows")),
}


class _Codec(NamedTuple):
    """A layout prepared for use, so that encoding and decoding a message look nothing up by name."""

    layout: Layout
    make: Callable[..., Message]
    blank: list[Any]
    """The 15 values of a header in which only the kind is set."""
    fills: tuple[tuple[int, str], ...]
    """(index of a header field, attribute of the message that goes there)"""
    arrange: Callable[[tuple[Any, ...]], Iterable[Any]]
    """The fields of the header, then the values in the payload -> the arguments of the message class."""


def _codec(message_class: type[Message], layout: Layout) -> _Codec:
    blank = [*Header(kind=layout.kind)[:_DIMS], *(0,) * MAX_DIMS]
    fills = tuple([(Header._fields.index(field), attribute) for attribute, field in layout.header.items()])
    sources = {attribute: index for index, attribute in fills}
    for index, attribute in enumerate(layout.carried, start=len(Header._fields)):
        sources[attribute] = index
    order = [sources[field.name] for field in fields(message_class)]
    # itemgetter returns a tuple only for two or more indices.
    arrange = itemgetter(*order) if len(order) > 1 else lambda values: (values[order[0]],)
    return _Codec(layout, message_class, blank, fills, arrange)


_BY_CLASS = {message_class: _codec(message_class, layout) for message_class, layout in LAYOUTS.items()}
_BY_KIND = {codec.layout.kind: codec for codec in _BY_CLASS.values()}
