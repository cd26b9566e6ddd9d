"""Gate scores and who is alive -> a route: for every row, who is wanted and who is asked.

Pure: knows neither sockets nor time.
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
    """Where the rows of one request go."""

    own: int
    """The origin's own expert: it needs no socket, and is everybody's last resort."""
    alive: frozenset[int]
    """The experts that can be asked, the own one among them."""
    scores: NDArray[np.float32]
    """(rows, experts): the gate's, before any softmax; answers are weighed with them"""
    preferred: NDArray[np.float32]
    """(rows, experts): what ranks the experts: the gate's scores, or those less what a far peer loses"""
    wanted: tuple[tuple[int, ...], ...]
    """For each row the experts that the gate picks, the best first."""
    chosen: tuple[tuple[int, ...], ...]
    """For each row the experts that are asked: the wanted ones, or the best of those alive."""

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.chosen)

    def ranking(self, row: int) -> list[int]:
        """All experts from the gate's favourite down; of equals, the lower number first."""
        ranked: list[int] = np.argsort(-self.preferred[row], kind="stable").tolist()
        return ranked


def route(
    scores: NDArray[Any],
    own: int,
    alive: Collection[int],
    top_k: int,
    at_home: Collection[int] = (),
    losses: NDArray[Any] | None = None,
) -> Route:
    """Pick every row's top-k experts; a row that stands in `at_home` wants the own expert alone.

    scores: (rows, experts); losses: (experts,), what each loses of its score when they are ranked
    """
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise LocalProtocolError("gate scores are finite numbers, (rows, experts)")
    experts = scores.shape[1]
    if not 0 <= own < experts:
        raise LocalProtocolError(f"expert {own} is not in 0..{experts - 1}")
    if not 1 <= top_k <= min(experts, MAX_ANSWERED):
        raise LocalProtocolError(f"top-k {top_k} is not in 1..{min(experts, MAX_ANSWERED)}")
    reachable = (frozenset(alive) | {own}) & frozenset(range(experts))
    wanted, chosen = [], []
    preferred = scores if losses is None else scores - np.asarray(losses, np.float32)
    for row, ranked in enumerate((-preferred).argsort(axis=1, kind="stable").tolist()):
        home = row in at_home
        wanted.append((own,) if home else tuple(ranked[:top_k]))
        chosen.append((own,) if home else tuple([e for e in ranked if e in reachable][:top_k]))
    return Route(own, reachable, scores, preferred, tuple(wanted), tuple(chosen))
