"""Messages as frames, and frames as messages. WIRE.md says the same to people.

A message is a header of 64 bytes and, for most kinds, a payload. `decode` raises RemoteProtocolError or returns a
sound message, and nothing else, whatever arrives. Knows no socket: two ends are tested in memory.
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
"""A dtype's code, rows, dims, the payload: what a kind's body puts into a message."""

MAGIC = b"nM"
HEADER = struct.Struct("<2s 4B H 2Q 2I 16s 4I")
"""The places of Header, little-endian: 64 bytes."""

_DTYPE_CODES = {"uint8": 1, "int8": 2, "int64": 3, "float16": 4, "float32": 5}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}
_NOBODY = 0xFFFF
"""Fills up a row that names fewer experts than another of the same Result."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a device is willing to look at. A message over a cap is refused before its payload is touched."""

    rows: int = 4096
    row_values: int = 4 * 1024 * 1024
    """Numbers in one row: an image of 1024 × 1024 × 3 fits."""
    payload_bytes: int = 32 * 1024 * 1024
    """A batch of ten such images fits; a device with little memory lowers it."""
    text_bytes: int = 64 * 1024
    """JSON and text."""


DEFAULT_CAPS = Caps()


class Header(NamedTuple):
    """The fixed part of every message. A kind sends zero in the places that it does not use, and reads none of them."""

    magic: bytes = MAGIC
    version: int = PROTOCOL
    kind: int = 0
    dtype: int = 0
    """Of the tensor in the payload, by _DTYPE_CODES; 0 without one."""
    code: int = 0
    """A Reason."""
    expert: int = 0
    request: int = 0
    trace: int = 0
    time: int = 0
    """Ask, Infer: what is left of the budget, in ms. Answer, Result: how long it took, in µs."""
    rows: int = 0
    trunk: bytes = bytes(TRUNK_BYTES)
    dims: tuple[int, ...] = (0,) * MAX_DIMS
    """Of one row, zeros after the last. In a Result: outputs, experts and missing experts a row."""


_DTYPE, _ROWS, _DIMS = (Header._fields.index(place) for place in ("dtype", "rows", "dims"))


def encode(message: Message) -> Frames:
    """A message as frames: its header and, when its kind has one, its payload."""
    codec = _BY_CLASS[type(message)]
    dtype, rows, dims, payload = codec.layout.body.write(message, codec.layout.carried)
    places = codec.blank.copy()
    for place, field in codec.fills:
        places[place] = getattr(message, field)
    places[_DTYPE], places[_ROWS], places[_DIMS : _DIMS + len(dims)] = dtype, rows, dims
    header = HEADER.pack(*places)
    return (header,) if payload is None else (header, payload)


def decode(frames: Sequence[bytes], caps: Caps = DEFAULT_CAPS) -> Message:
    """Frames as a message, or RemoteProtocolError."""
    if not 1 <= len(frames) <= 2:
        raise RemoteProtocolError(f"a message has one frame or two, not {len(frames)}")
    if len(frames[0]) != HEADER.size:
        raise RemoteProtocolError(f"a header has {HEADER.size} bytes, not {len(frames[0])}")
    places = HEADER.unpack(frames[0])
    header = Header._make((*places[:_DIMS], places[_DIMS:]))
    if header.magic != MAGIC:
        raise RemoteProtocolError("no magic: the other side does not speak this protocol")
    if header.version != PROTOCOL:
        raise RemoteProtocolError(f"the other side speaks version {header.version}, this device {PROTOCOL}")
    codec = _BY_KIND.get(header.kind)
    if codec is None:
        raise RemoteProtocolError(f"kind {header.kind} is none of {sorted(_BY_KIND)}")
    payload = frames[1] if len(frames) == 2 else b""
    try:
        if len(payload) > caps.payload_bytes:
            raise RemoteProtocolError(f"{len(payload)} bytes are over the cap of {caps.payload_bytes}")
        carried = codec.layout.body.read(header, payload, caps, codec.layout.carried)
        return codec.make(*codec.arrange((*header, *carried)))
    except (RemoteProtocolError, LocalProtocolError) as error:
        # A message checks itself; this one was made of their bytes, so the fault is theirs.
        request = header.request if "request" in codec.layout.header else None
        raise RemoteProtocolError(str(error), request) from error


def glance(frames: Sequence[bytes]) -> tuple[int, int] | None:
    """Number and budget in ms of an Infer, by its header alone, for who has no time for more; None of other kinds."""
    if len(frames) != 2 or len(frames[0]) != HEADER.size:
        return None
    magic, version, kind, _, _, _, request, _, budget_ms, *_ = HEADER.unpack(frames[0])
    return (request, budget_ms) if (magic, version, kind) == (MAGIC, PROTOCOL, LAYOUTS[Infer].kind) else None


class Body(NamedTuple):
    """How a kind's payload is written and read."""

    name: str
    write: Callable[[Any, tuple[str, ...]], Written]
    """(message, the fields it carries) -> what is written"""
    read: Callable[[Header, bytes, Caps, tuple[str, ...]], tuple[Any, ...]]
    """-> the fields it carries"""


def _write_nothing(_message: Any, _carried: tuple[str, ...]) -> Written:
    return 0, 0, (), None


def _read_nothing(_header: Header, payload: bytes, _caps: Caps, _carried: tuple[str, ...]) -> tuple[()]:
    if payload:
        raise RemoteProtocolError(f"{len(payload)} bytes where nothing was due")
    return ()


def _write_tensor(message: Any, carried: tuple[str, ...]) -> Written:
    tensor: Tensor = getattr(message, carried[0])
    rows, *dims = tensor.shape
    return _DTYPE_CODES[tensor.dtype], rows, dims, tensor.data


def _read_tensor(header: Header, payload: bytes, caps: Caps, _carried: tuple[str, ...]) -> tuple[Tensor]:
    dtype = _DTYPE_NAMES.get(header.dtype)
    if dtype is None:
        raise RemoteProtocolError(f"dtype {header.dtype} is none of {sorted(_DTYPE_NAMES)}")
    dims = header.dims[: header.dims.index(0)] if 0 in header.dims else header.dims
    if any(header.dims[len(dims) :]):
        raise RemoteProtocolError(f"dims {header.dims} are no shape")
    _check_counts(header.rows, math.prod(dims), caps)
    # That the length fits the shape, Tensor checks itself before it looks at a byte.
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
        raise RemoteProtocolError(f"{len(payload)} bytes of text are over the cap of {caps.text_bytes}")
    try:
        return (payload.decode(),)
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("text that is not UTF-8") from error


def _write_json(message: Any, carried: tuple[str, ...]) -> Written:
    said = {field: getattr(message, field) for field in carried}
    return 0, 0, (), json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _read_json(header: Header, payload: bytes, caps: Caps, carried: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        said = parse_json(*_read_text(header, payload, caps, carried))
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from error
    if not isinstance(said, dict) or not said.keys() >= set(carried):
        raise RemoteProtocolError(f"the payload is no JSON object of {', '.join(carried)}")
    # Keys that this version does not know are passed over: a greeting is what versions are agreed on with.
    return tuple(tuple(said[key]) if isinstance(said[key], list) else said[key] for key in carried)


def _write_result(message: Result, _carried: tuple[str, ...]) -> Written:
    outputs, rows = message.outputs, message.rows
    answered = max(len(row.experts) for row in rows)
    missing = max(len(row.missing) for row in rows)
    parts = (
        outputs.data,  # (rows, outputs)
        _pad([row.weights for row in rows], answered, 0, "<f4"),  # (rows, answered)
        _pad([row.experts for row in rows], answered, _NOBODY, "<u2"),  # (rows, answered)
        _pad([row.missing for row in rows], missing, _NOBODY, "<u2"),  # (rows, missing)
    )
    dims = (outputs.shape[1], answered, missing)
    return _DTYPE_CODES["float32"], outputs.rows, dims, b"".join(parts)


def _pad(rows: list[tuple[Any, ...]], width: int, fill: int, dtype: str) -> bytes:
    """Rows of unequal length as one array, the short ones filled up."""
    return np.array([(*row, *[fill] * (width - len(row))) for row in rows], dtype).tobytes()


def _read_result(
    header: Header, payload: bytes, caps: Caps, _carried: tuple[str, ...]
) -> tuple[Tensor, tuple[RowAnswer, ...]]:
    n, (outputs, answered, missing, rest) = header.rows, header.dims
    if header.dtype != _DTYPE_CODES["float32"] or rest or max(answered, missing) > MAX_ANSWERED:
        raise RemoteProtocolError(f"a result has not dtype {header.dtype} and dims {header.dims}")
    _check_counts(n, outputs, caps)
    expected = n * (4 * outputs + (4 + 2) * answered + 2 * missing)
    if len(payload) != expected:
        raise RemoteProtocolError(f"{len(payload)} bytes for a result, which takes {expected}")
    end = 4 * n * outputs  # of the outputs; then of the weights, of the experts
    weights = np.frombuffer(payload, "<f4", n * answered, end).reshape(n, answered)
    experts = np.frombuffer(payload, "<u2", n * answered, end + weights.nbytes).reshape(n, answered)
    absent = np.frombuffer(payload, "<u2", n * missing, end + weights.nbytes + experts.nbytes).reshape(n, missing)
    rows = tuple(map(_read_row, experts.tolist(), weights.tolist(), absent.tolist()))
    return Tensor("float32", (n, outputs), payload[:end]), rows


def _read_row(experts: list[int], weights: list[float], missing: list[int]) -> RowAnswer:
    named = _unpad(experts)
    if any(weights[len(named) :]):
        raise RemoteProtocolError("a weight without its expert")
    return RowAnswer(named, tuple(weights[: len(named)]), _unpad(missing))


def _unpad(experts: list[int]) -> tuple[int, ...]:
    end = experts.index(_NOBODY) if _NOBODY in experts else len(experts)
    if any(expert != _NOBODY for expert in experts[end:]):
        raise RemoteProtocolError("an expert after the end of its row")
    return tuple(experts[:end])


_NOTHING = Body("nothing", _write_nothing, _read_nothing)
_TENSOR = Body("tensor", _write_tensor, _read_tensor)
_TEXT = Body("text", _write_text, _read_text)
_JSON = Body("JSON", _write_json, _read_json)
_RESULT = Body("result", _write_result, _read_result)


class Layout(NamedTuple):
    """How one kind of message lies on the wire."""

    kind: int
    header: dict[str, str]
    """Field of the message -> its place in the header."""
    body: Body = _NOTHING
    carried: tuple[str, ...] = ()
    """Fields of the message that the body carries."""


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
    """A layout made ready: nothing about a kind is found out anew for each of its messages."""

    layout: Layout
    make: Callable[..., Message]
    blank: list[Any]
    """The 15 numbers and names of a header, the kind's own filled in."""
    fills: tuple[tuple[int, str], ...]
    """Which of them is which field of the message."""
    arrange: Callable[[tuple[Any, ...]], Iterable[Any]]
    """The places of Header and what the body carries -> the message's fields in their order."""


def _codec(made: type[Message], layout: Layout) -> _Codec:
    blank = [*Header(kind=layout.kind)[:_DIMS], *(0,) * MAX_DIMS]
    fills = tuple((Header._fields.index(place), field) for field, place in layout.header.items())
    sources = {field: place for place, field in fills}
    sources |= {field: len(Header._fields) + i for i, field in enumerate(layout.carried)}
    order = [sources[field.name] for field in fields(made)]
    # Of one index itemgetter makes no tuple.
    arrange = itemgetter(*order) if len(order) > 1 else lambda places: (places[order[0]],)
    return _Codec(layout, made, blank, fills, arrange)


_BY_CLASS = {made: _codec(made, layout) for made, layout in LAYOUTS.items()}
_BY_KIND = {codec.layout.kind: codec for codec in _BY_CLASS.values()}
