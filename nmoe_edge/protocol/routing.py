"""Decides which experts a request asks: gate scores and the reachable experts -> a Route.

Pure: exchange.py sends the request along the route.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.common.limits import MAX_ANSWERED
from nmoe_edge.errors import LocalProtocolError


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Which experts each row of one request wants, and which it asks."""

    own: int
    """The expert of the device that received the request: it needs no socket, and is every row's last resort."""
    alive: frozenset[int]
    """The experts that can be asked, the own one included."""
    scores: NDArray[np.float32]
    """(rows, experts): the gate's scores, which weigh the answers."""
    preferred: NDArray[np.float32]
    """(rows, experts): what ranks the experts: the scores, less a penalty for slow peers if there is one."""
    wanted: tuple[tuple[int, ...], ...]
    """For each row the experts that the gate picks, best first."""
    chosen: tuple[tuple[int, ...], ...]
    """For each row the experts to ask: the best of those alive, as many as wanted if there are enough."""

    @property
    def rows(self) -> int:
        """Number of rows in the request."""
        return len(self.chosen)

    def ranking(self, row: int) -> list[int]:
        """All experts of a row, best first; of equals, the lower number first."""
        ranked: list[int] = ranking(self.preferred[row]).tolist()
        return ranked


def ranking(preferred: NDArray[Any]) -> NDArray[np.intp]:
    """Experts by score, best first; of equals, the lower number first. (…, experts) -> (…, experts)"""
    return (-preferred).argsort(axis=-1, kind="stable")


def check_scores(scores: NDArray[np.float32], own: int, top_k: int) -> None:
    """Raise LocalProtocolError unless scores are finite (rows, experts), and `own` and `top_k` in range."""
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise LocalProtocolError("gate scores must be finite and have shape (rows, experts)")
    experts = scores.shape[1]
    if not 0 <= own < experts:
        raise LocalProtocolError(f"expert {own} is not in 0..{experts - 1}")
    if not 1 <= top_k <= min(experts, MAX_ANSWERED):
        raise LocalProtocolError(f"top-k {top_k} is not in 1..{min(experts, MAX_ANSWERED)}")


def route(
    scores: NDArray[Any],
    own: int,
    alive: Collection[int],
    top_k: int,
    local_rows: Collection[int] = (),
    penalties: NDArray[Any] | None = None,
) -> Route:
    """Pick the top-k experts of every row. LocalProtocolError for scores, `own` or `top_k` out of range.

    scores: (rows, experts), before any softmax
    local_rows: rows to answer locally: they want the own expert alone
    penalties: (experts,), subtracted from the scores when experts are ranked
    """
    scores = np.asarray(scores, np.float32)
    check_scores(scores, own, top_k)
    experts = scores.shape[1]
    reachable = (frozenset(alive) | {own}) & frozenset(range(experts))
    preferred = scores if penalties is None else scores - np.asarray(penalties, np.float32)
    wanted: list[tuple[int, ...]] = []
    chosen: list[tuple[int, ...]] = []
    for row, ranked in enumerate(ranking(preferred).tolist()):
        if row in local_rows:
            wanted.append((own,))
            chosen.append((own,))
        else:
            wanted.append(tuple(ranked[:top_k]))
            chosen.append(tuple([expert for expert in ranked if expert in reachable][:top_k]))
    return Route(own, reachable, scores, preferred, tuple(wanted), tuple(chosen))
