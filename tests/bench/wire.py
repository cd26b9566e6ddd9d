"""Times a message and an exchange: an Ask with one row of 512 floats, in µs. Part of `make bench`.

`encode` and `decode` convert between message and frames; `pack` and `unpack` between float32 rows and the latent's
dtype. An exchange is all the bookkeeping of one request: route, start, answers, result. Steps are measured in turn and
reported as medians, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import timeit

import numpy as np

from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.messages import Ask
from nmoe_edge.protocol.routing import route
from nmoe_edge.protocol.tensor import LATENT_DTYPES, Tensor
from nmoe_edge.protocol.wire import decode, encode

REPEATS = 25


def microseconds(steps, calls=2000):
    """Median time of a call of each step. steps: name -> function"""
    times = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            times[name].append(timeit.timeit(step, number=calls) / calls * 1e6)
    return {name: statistics.median(measured) for name, measured in times.items()}


def exchange(rows, scores):
    """One request of `rows` rows to ten experts, which all answer at once."""
    one = Exchange(route(scores[:rows], 0, range(10), 1), 10, itertools.count(), deadline=1.0)
    for call in one.start(0.0):
        one.answered(call.request, call.expert, np.zeros((len(call.rows), 10), np.float32), 0.001)
    return one.result()


def main():
    """Measure and print the tables."""
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
    scores = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)
    cost = microseconds({rows: lambda rows=rows: exchange(rows, scores) for rows in (1, 8, 64)}, calls=50)
    print("an exchange, µs: " + ", ".join(f"{value:.0f} for {rows} rows" for rows, value in cost.items()))


if __name__ == "__main__":
    main()
