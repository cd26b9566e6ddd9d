from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from edge.samples import MESSAGES, TRUNK
from hypothesis import given
from hypothesis import strategies as st

import nmoe_edge.protocol.wire as wire_module
from nmoe_edge.errors import RemoteProtocolError
from nmoe_edge.protocol.messages import Ask, Hello, Infer, Message, Reason, Refuse, Report, Result, RowAnswer
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import HEADER, LAYOUTS, Caps, Header, decode, encode, peek_infer

NASTY = [json.loads(line) for line in Path(__file__).with_name("nasty_frames.jsonl").read_text().splitlines()]
WIRE_MD = Path(wire_module.__file__).with_name("WIRE.md").read_text()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_round_trips(message):
    assert decode(encode(message)) == message


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["int8", "float16", "float32"]),
    st.tuples(st.integers(1, 9), st.integers(1, 600)),
)
def test_any_ask_round_trips(request, budget_ms, dtype, shape):
    latents = Tensor.pack(np.linspace(-2, 2, shape[0] * shape[1], dtype=np.float32).reshape(shape), dtype)
    ask = Ask(request, request ^ 5, budget_ms, 3, TRUNK, latents)
    assert decode(encode(ask)) == ask


row_answers = st.lists(st.integers(0, 1023), unique=True, max_size=12).map(
    lambda ids: RowAnswer(tuple(ids[::2]), (1 / len(ids[::2]),) * len(ids[::2]) if ids else (), tuple(ids[1::2]))
)


@given(st.lists(row_answers, min_size=1, max_size=6))
def test_any_result_round_trips(rows):
    result = Result(1, 2, Tensor.pack(np.ones((len(rows), 3), np.float32), "float32"), tuple(rows))
    back = decode(encode(result))
    assert [(row.experts, row.missing) for row in back.rows] == [(row.experts, row.missing) for row in rows]
    for row, sent in zip(back.rows, rows, strict=True):
        assert row.weights == pytest.approx(sent.weights, rel=1e-6)


@pytest.mark.parametrize("case", NASTY, ids=lambda case: case["name"])
def test_invalid_frames_are_rejected_with_the_reason(case):
    with pytest.raises(RemoteProtocolError, match=re.escape(case["why"])):
        decode([bytes.fromhex(frame) for frame in case["frames"]])


@pytest.mark.parametrize(("dtype", "max_bytes"), [("float16", 576), ("int8", 324)])
def test_a_latent_row_of_256_floats_is_as_small_as_wire_md_says(dtype, max_bytes):
    latents = Tensor.pack(np.ones((1, 256), np.float32), dtype)
    assert sum(map(len, encode(Ask(1, 2, 3, 4, TRUNK, latents)))) <= max_bytes


def test_the_header_is_64_bytes():
    assert HEADER.size == 64
    assert all(len(encode(message)[0]) == 64 for message in MESSAGES)


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        (Caps(rows=1), Ask(1, 0, 0, 0, TRUNK, Tensor.pack(np.ones((2, 4)), "float32"))),
        (Caps(row_values=3), Ask(1, 0, 0, 0, TRUNK, Tensor.pack(np.ones((2, 4)), "float32"))),
        (Caps(payload_bytes=31), Ask(1, 0, 0, 0, TRUNK, Tensor.pack(np.ones((2, 4)), "float32"))),
        (Caps(text_bytes=10), Report(1, '{"a": 1234567}')),
        (Caps(text_bytes=10), Hello("attic", 0, TRUNK)),
        (Caps(rows=1), Result(1, 0, Tensor.pack(np.ones((2, 4)), "float32"), (RowAnswer((1,), (1.0,)),) * 2)),
    ],
)
def test_a_message_over_a_cap_is_rejected(caps, message):
    assert decode(encode(message)) == message
    with pytest.raises(RemoteProtocolError):
        decode(encode(message), caps)


def test_header_fields_that_a_kind_does_not_use_are_not_read():
    header, payload = encode(MESSAGES[0])
    noisy = list(HEADER.unpack(header))
    for field, value in (("code", 9), ("trace", 77), ("rows", 5)):
        noisy[Header._fields.index(field)] = value
    noisy = HEADER.pack(*noisy[:-4], 9, 9, 9, 9)
    assert decode([noisy, payload]) == MESSAGES[0]


def test_unknown_keys_in_a_hello_are_ignored():
    hello = MESSAGES[0]
    header, payload = encode(hello)
    later = json.dumps({**json.loads(payload), "clock": [1, 2]}).encode()
    assert decode([header, later]) == hello


@pytest.mark.parametrize("message", [m for m in MESSAGES if hasattr(m, "request")], ids=lambda m: type(m).__name__)
def test_the_error_about_an_invalid_message_carries_its_request_number(message):
    header, *payload = encode(message)
    with pytest.raises(RemoteProtocolError) as refused:
        decode([header, payload[0] + b"\xff" if payload else b"x"])
    assert refused.value.request == message.request


def test_a_cap_is_checked_before_the_payload_is_read():
    infer = encode(Infer(1, 0, 0, Tensor.pack(np.zeros((1, 2), np.uint8), "uint8")))

    class Untouchable(bytes):
        def __bytes__(self):
            raise AssertionError("the payload was copied")

    with pytest.raises(RemoteProtocolError, match="cap"):
        decode([infer[0], Untouchable(100)], Caps(payload_bytes=99))


def test_every_message_has_its_own_kind():
    kinds = [layout.kind for layout in LAYOUTS.values()]
    assert kinds == list(range(1, len(Message.__args__) + 1))


def test_wire_md_lists_every_kind_and_its_header_fields():
    rows = re.findall(r"^\| (\d+) \| ([A-Z]\w+) \|([^|]*)\|", WIRE_MD, re.M)
    documented = {(int(kind), name, frozenset(re.findall(r"\w+", fields))) for kind, name, fields in rows}
    tensor = {"tensor": {"tensor"}, "result": {"tensor"}}
    assert documented == {
        (layout.kind, kind.__name__, frozenset(layout.header.values()) | tensor.get(layout.body.name, set()))
        for kind, layout in LAYOUTS.items()
    }


def test_wire_md_lists_every_header_field():
    fields = re.findall(r"^\| \d+ \| \d+ \| `(\w+)` \|", WIRE_MD, re.M)
    assert tuple(fields) == Header._fields


def test_wire_md_gives_every_header_field_its_offset():
    offsets = [int(o) for o in re.findall(r"^\| (\d+) \| \d+ \| `\w+` \|", WIRE_MD, re.M)]
    sizes = [int(s) for s in re.findall(r"^\| \d+ \| (\d+) \| `\w+` \|", WIRE_MD, re.M)]
    assert offsets == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == HEADER.size


def test_glance_reads_number_and_budget_of_an_infer_only():
    infer = Infer(7, 1, 250, Tensor("uint8", (1, 2), b"ab"))
    header, payload = encode(infer)
    assert peek_infer((header, payload)) == (7, 250)
    for frames in ([], [header], [header, payload, b""], [header[:-1], payload], [b"x" + header[1:], payload]):
        assert peek_infer(frames) is None
    assert peek_infer(encode(Refuse(7, Reason.BUSY))) is None
