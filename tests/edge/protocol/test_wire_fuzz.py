"""Whatever arrives, decode returns a valid message or raises RemoteProtocolError, and nothing else."""

from __future__ import annotations

import random

from edge.samples import MESSAGES
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe_edge.errors import RemoteProtocolError
from nmoe_edge.protocol.wire import HEADER, MAGIC, decode, encode

FUZZ = settings(settings.get_profile("fuzz"))
SAMPLES = [encode(message) for message in MESSAGES]
NASTY_BYTES = (0, 1, 2, 3, 4, 5, 6, 11, 12, 0x7F, 0x80, 0xFE, 0xFF)


def outcome(frames):
    """The message, or None if it was rejected. Any other exception is the bug that these tests look for."""
    try:
        message = decode(frames)
    except RemoteProtocolError:
        return None
    assert decode(encode(message)) == message
    return message


@FUZZ
@given(st.lists(st.binary(max_size=200), max_size=3), st.binary(min_size=HEADER.size - 4, max_size=HEADER.size - 4))
def test_arbitrary_frames_are_rejected_or_valid(frames, rest_of_header):
    outcome(frames)
    # With a correct magic and version, so that every kind's reader is reached.
    outcome([MAGIC + b"\x01" + bytes([1 + rest_of_header[0] % 13]) + rest_of_header, *frames[:1]])


@FUZZ
@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_mutated_messages_are_rejected_or_valid(seed):
    chance = random.Random(seed)
    outcome(mutated(list(chance.choice(SAMPLES)), chance))


def mutated(frames, chance):
    """A valid message after one to four random changes."""
    for _ in range(chance.randint(1, 4)):
        which = chance.randrange(len(frames))
        frame = bytearray(frames[which])
        at = chance.randrange(len(frame) + 1)
        change = chance.randrange(6)
        if change == 0 and at < len(frame):
            frame[at] = chance.choice(NASTY_BYTES)
        elif change == 1 and at < len(frame):
            frame[at] ^= 1 << chance.randrange(8)
        elif change == 2:
            del frame[at : at + chance.randint(1, 8)]
        elif change == 3:
            frame[at:at] = chance.randbytes(chance.randint(1, 8))
        elif change == 4 and len(frames) < 4:
            frames.append(chance.choice(chance.choice(SAMPLES)))
        elif change == 5:
            other = chance.choice(SAMPLES)
            frame = bytearray(other[min(which, len(other) - 1)])
        frames[which] = bytes(frame)
    return frames
