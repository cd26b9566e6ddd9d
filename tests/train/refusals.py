"""For tests of loading: a DataError of one line, and files with random damage."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from nmoe_train.errors import DataError


def refused(text):
    """Expect a DataError of one line that contains `text`."""
    return pytest.raises(DataError, match=rf"\A(?!.*\n).*{text}")


def assert_survives_damage(whole, path, read, times):
    """Truncate, overwrite and insert bytes at random: `read` must succeed or raise DataError."""
    draw = np.random.default_rng(0)
    for _ in range(times):
        damaged = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(min(len(damaged), draw.choice([64, 128, 10**6]))))
            match draw.integers(4):
                case 0:
                    damaged = damaged[: at + 1]
                case 1:
                    damaged[at:at] = draw.bytes(3)
                case _:
                    damaged[at] = draw.choice([0, 255, *b"(['{,9-O"])
        path.write_bytes(damaged)
        with suppress(DataError):
            read(path)
