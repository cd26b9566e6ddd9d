"""What a message costs: an Ask with one row of 512 floats, in µs. Run it with `make bench`.

`encode` and `decode` are what the wire does; `pack` and `unpack` turn float32 rows into the latent's dtype and back.
Medians of repeats in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import platform
import statistics
import timeit

import numpy as np

from nmoe_edge.protocol.messages import Ask
from nmoe_edge.protocol.tensor import LATENT_DTYPES, Tensor
from nmoe_edge.protocol.wire import decode, encode

REPEATS, CALLS = 25, 2000


def microseconds(steps):
    """The median of each step's time a call."""
    times = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            times[name].append(timeit.timeit(step, number=CALLS) / CALLS * 1e6)
    return {name: statistics.median(measured) for name, measured in times.items()}


def main():
    """Print the table."""
    rows = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    print(f"an Ask with one row of 512 floats, µs; Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{'latent':<8} {'bytes':>6} {'encode':>7} {'decode':>7} {'both':>7} {'pack':>7} {'unpack':>7}")
    for dtype in LATENT_DTYPES:
        latents = Tensor.pack(rows, dtype)
        ask = Ask(1, 2, 250, 3, bytes(16), latents)
        frames = encode(ask)
        cost = microseconds(
            {
                "encode": lambda ask=ask: encode(ask),
                "decode": lambda frames=frames: decode(frames),
                "pack": lambda dtype=dtype: Tensor.pack(rows, dtype),
                "unpack": latents.unpack,
            }
        )
        print(
            f"{dtype:<8} {sum(map(len, frames)):>6} {cost['encode']:>7.1f} {cost['decode']:>7.1f}"
            f" {cost['encode'] + cost['decode']:>7.1f} {cost['pack']:>7.1f} {cost['unpack']:>7.1f}"
        )


if __name__ == "__main__":
    main()
