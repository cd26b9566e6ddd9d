"""One valid message of every kind, and more where a kind has several forms."""

from __future__ import annotations

import dataclasses

import numpy as np

from nmoe_edge.protocol.messages import (
    Answer,
    Ask,
    Hello,
    Infer,
    Leave,
    Ping,
    Pong,
    Reason,
    Refuse,
    Report,
    Result,
    RowAnswer,
    Status,
    Welcome,
)
from nmoe_edge.protocol.tensor import Tensor

TRUNK = bytes(range(16))
ROWS = np.array([[0.5, -1.0, 0.25, 0.0], [2.0, 4.0, -8.0, 1.0]], np.float32)
IMAGE = np.arange(2 * 1 * 2 * 3, dtype=np.uint8).reshape(2, 1, 2, 3)
OUTPUTS = Tensor.pack(ROWS[:, :3], "float32")

MESSAGES = (
    Hello("attic", 0, TRUNK, ("latent:float16", "latent:int8"), (1, 2), "0123456789abcdef" * 4),
    Hello("b", 1023, TRUNK),
    Welcome("barn.local", 1, TRUNK, ("latent:int8",), 1, "fedcba9876543210" * 4),
    Ask(7, 99, 250, 1, TRUNK, Tensor.pack(ROWS, "float32")),
    Ask(8, 0, 0, 1, TRUNK, Tensor.pack(ROWS, "float16")),
    Ask(2**64 - 1, 2**64 - 1, 2**32 - 1, 1, TRUNK, Tensor.pack(ROWS, "int8")),
    Answer(7, 1, 12, OUTPUTS),
    Answer(7, 1, 12, Tensor.pack(ROWS, "float16")),
    Refuse(7, Reason.BUSY),
    Refuse(0, Reason.WRONG_TRUNK, "no welcome here"),
    Refuse(7, Reason.WRONG_TRUNK, "latents of another extractor: 00ff, not 90ab"),
    Ping(1),
    Pong(1),
    Leave("attic"),
    Status(3),
    Report(3, '{"rows": 12, "peers": {"barn": {"p50_us": 130}}}'),
    Infer(5, 99, 500, Tensor.pack(IMAGE, "uint8")),
    Infer(6, 0, 500, Tensor.pack(np.array([[1, -2], [3, 2**40]]), "int64")),
    Result(
        5,
        1500,
        OUTPUTS,
        (RowAnswer((2, 0), (0.75, 0.25), (1,)), RowAnswer((), (), (2, 1))),
    ),
    Result(6, 900, OUTPUTS, (RowAnswer((1,), (1.0,)), RowAnswer((1,), (1.0,)))),
)


def as_plain(message):
    """A message as JSON types, with the name of its kind."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, bytes):
            return value.hex()
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {"kind": type(message).__name__, **plain(message)}
