from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
from edge.samples import MESSAGES, OUTPUTS, TRUNK

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.messages import (
    Answer,
    Ask,
    Hello,
    Infer,
    Leave,
    Message,
    Ping,
    Reason,
    Refuse,
    Report,
    Result,
    RowAnswer,
    Welcome,
)
from nmoe_edge.protocol.tensor import Tensor

LATENTS = Tensor.pack(np.ones((1, 4), np.float32), "float32")


def test_there_is_a_sample_of_every_message():
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_are_frozen_and_comparable(message):
    assert message == dataclasses.replace(message)
    assert hash(message) == hash(dataclasses.replace(message))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, dataclasses.fields(message)[0].name, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hello("", 0, TRUNK),
        lambda: Hello("../up", 0, TRUNK),
        lambda: Hello("a" * 64, 0, TRUNK),
        lambda: Hello("attic", -1, TRUNK),
        lambda: Hello("attic", 1024, TRUNK),
        lambda: Hello("attic", 0, TRUNK[:15]),
        lambda: Hello("attic", 0, TRUNK, ("UPPER",)),
        lambda: Hello("attic", 0, TRUNK, (), ()),
        lambda: Welcome("attic", 0, TRUNK, (), 256),
        lambda: Ask(-1, 0, 0, 0, TRUNK, LATENTS),
        lambda: Ask(2**64, 0, 0, 0, TRUNK, LATENTS),
        lambda: Ask(0, 2**64, 0, 0, TRUNK, LATENTS),
        lambda: Ask(0, 0, 2**32, 0, TRUNK, LATENTS),
        lambda: Ask(0, 0, 0, 0, TRUNK, Tensor("uint8", (1, 4), b"1234")),
        lambda: Ask(0, 0, 0, 0, TRUNK, Tensor.pack(np.ones((1, 2, 2), np.float32), "float32")),
        lambda: Answer(0, 0, 2**32, OUTPUTS),
        lambda: Answer(1, 1, 12.7, OUTPUTS),
        lambda: Ask(0, 0, 250.0, 0, TRUNK, LATENTS),
        lambda: Ask(0, 0, 0, 0, TRUNK.hex()[:16], LATENTS),
        lambda: Hello("attic", 0, TRUNK, bundle="short"),
        lambda: Ping(0.5),
        lambda: Infer(0, 0, 0, Tensor.pack(np.ones((1, 2), np.float32), "int8")),
        lambda: Report(0, '{"a": 1e999}'),
        lambda: Answer(0, 0, 0, Tensor.pack(np.ones((1, 2), np.float32), "int8")),
        lambda: Refuse(0, 0),
        lambda: Refuse(0, Reason.BUSY, "two\nlines"),
        lambda: Refuse(0, Reason.BUSY, "x" * 201),
        lambda: Leave("a/b"),
        lambda: Report(0, "[]"),
        lambda: Report(0, '{"a": NaN}'),
        lambda: Report(0, '{"a": "é"}'),
        lambda: RowAnswer((1, 2), (1.0,)),
        lambda: RowAnswer((1, 1), (0.5, 0.5)),
        lambda: RowAnswer((1,), (1.0,), (1,)),
        lambda: RowAnswer((1, 2), (0.5, 0.4)),
        lambda: RowAnswer((1, 2), (1.5, -0.5)),
        lambda: RowAnswer(tuple(range(65)), (1 / 65,) * 65),
        lambda: RowAnswer((), (), tuple(range(65))),
        lambda: Result(0, 0, OUTPUTS, (RowAnswer((1,), (1.0,)),)),
        lambda: Result(0, 0, Tensor.pack(np.ones((1, 2), np.float32), "float16"), (RowAnswer((1,), (1.0,)),)),
    ],
)
def test_an_invalid_message_cannot_be_made(make):
    with pytest.raises(LocalProtocolError):
        make()


def test_a_row_is_degraded_when_an_expert_is_missing_or_none_answered():
    assert not RowAnswer((1,), (1.0,)).degraded
    assert RowAnswer((1,), (1.0,), (2,)).degraded
    assert RowAnswer((), ()).degraded
