"""An exchange with four made-up experts, for the tests of exchange.py."""

from __future__ import annotations

import itertools
import math

import numpy as np

from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.routing import route

OUTPUTS = 3
SCORES = np.array([[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 1.0, 2.0], [9.0, 0.0, 1.0, 2.0]], np.float32)


def outputs_of(expert, rows):
    """An expert's answers, different for every expert and row, so that a mix-up is found."""
    return np.array([[expert, row, expert * row + 1] for row in rows], np.float32)


def exchange(scores=SCORES, own=0, alive=range(4), top_k=1, deadline=10.0, patience=math.inf, local_rows=(), **more):
    found = route(scores, own, alive, top_k, local_rows)
    return Exchange(found, OUTPUTS, itertools.count(100), deadline=deadline, patience=lambda _: patience, **more)


def answer(it, call, now=1.0):
    return it.answered(call.request, call.expert, outputs_of(call.expert, call.rows), now)
