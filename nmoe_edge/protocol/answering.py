"""What a device answers, for many rows at once: scores and outputs -> class probabilities.

    own answer if confident and familiar, else the top-k experts -> weighted mixture -> probabilities -> class mix

A device computes the same for the few rows of a request, in steps, because its peers answer one by one: `local_rows`,
then routing.route, then combine.combine. Training and export, which have every expert's outputs, call `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.classmix import cross_adapted
from nmoe_edge.protocol.combine import COMBINATIONS, mixture, mixture_weights, softmax
from nmoe_edge.protocol.routing import check_scores, ranking

_CHUNK_ROWS = 4096
"""Rows computed together: their arrays stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """The rules of one answer. LocalProtocolError for values out of range."""

    top_k: int
    """Experts that a row is sent to."""
    combination: str
    """What is averaged: the experts' outputs, or the softmax of each (`probabilities`)."""
    local_first: float | None = None
    """0 to 1: the own expert answers alone where its top probability is above this; None: the gate decides alone."""
    familiar: float | None = None
    """0 or more: such a row's latent must also be at most this far from what the own expert knows; None: not tested."""
    adapt: bool = False
    """Whether probabilities are multiplied by the device's class mix."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise LocalProtocolError(f"top-k is {self.top_k}, less than 1")
        if self.combination not in COMBINATIONS:
            raise LocalProtocolError(f"combination {self.combination!r} is not one of {', '.join(COMBINATIONS)}")
        if self.local_first is not None and not 0 <= self.local_first <= 1:
            raise LocalProtocolError(f"local_first is {self.local_first}, not in 0..1")
        if self.familiar is not None and not 0 <= self.familiar < float("inf"):
            raise LocalProtocolError(f"familiar is {self.familiar}; it must be a finite number, 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """The answers to n rows of one device."""

    p: NDArray[np.float32]
    """(n, K): class probabilities"""
    routed: NDArray[np.float32]
    """(n, N): the share of each row that went to each expert; rows sum to 1"""
    local: NDArray[np.bool_]
    """(n,): whether the own expert answered alone because it was confident, and not because the gate chose it"""


class ExitRules(Protocol):
    """The rules of the local exit, as AnswerRules has them; a device has them with others."""

    @property
    def local_first(self) -> float | None: ...

    @property
    def familiar(self) -> float | None: ...


def local_rows(own_outputs: NDArray[Any], rules: ExitRules, distances: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """The rows that the own expert answers alone, (n,).

    own_outputs: (n, K), of the own expert
    distances: (n,), of familiar.Familiar; needed where `rules` test them
    """
    if rules.local_first is None:
        return np.zeros(len(own_outputs), bool)
    local: NDArray[np.bool_] = softmax(own_outputs).max(axis=1) > rules.local_first
    if rules.familiar is None:
        return local
    if distances is None:
        raise LocalProtocolError("the rules test whether a latent is familiar, and no distances are given")
    return local & (np.asarray(distances) <= rules.familiar)  # False for NaN


def answer(
    scores: NDArray[Any],
    outputs: NDArray[Any],
    own: int,
    rules: AnswerRules,
    distances: NDArray[Any] | None = None,
) -> Answered:
    """The answers of one device to rows that reach every expert, before the class mix.

    scores: (n, N), of the device's gate, before any softmax
    outputs: (n, N, K), of every expert, as peers send them
    own: the number of the device's own expert
    distances: (n,), of the latents from what the own expert knows; needed where `rules` test them

    LocalProtocolError for scores that are not finite, and for `own` or the top-k out of range.
    """
    scores = np.asarray(scores, np.float32)
    check_scores(scores, own, rules.top_k)
    local = local_rows(outputs[:, own], rules, distances)
    p = np.empty((len(scores), outputs.shape[2]), np.float32)
    routed = np.zeros(scores.shape, np.float32)
    for start in range(0, len(scores), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        top = ranking(scores[rows])[:, : rules.top_k]  # (rows, k)
        p[rows] = _mixed(scores[rows], outputs[rows], top, rules.combination)
        np.put_along_axis(routed[rows], top, np.float32(1 / rules.top_k), axis=1)
    p[local] = softmax(outputs[local, own])
    routed[local] = np.eye(scores.shape[1], dtype=np.float32)[own]
    return Answered(p, routed, local)


def answer_adapted(
    scores: NDArray[Any],
    outputs: NDArray[Any],
    own: int,
    rules: AnswerRules,
    distances: NDArray[Any] | None = None,
    seed: int = 0,
) -> Answered:
    """`answer`, and then the class mix where the rules adapt, as classmix.cross_adapted estimates it."""
    answered = answer(scores, outputs, own, rules, distances)
    if not rules.adapt:
        return answered
    return Answered(cross_adapted(answered.p, seed), answered.routed, answered.local)


def _mixed(
    scores: NDArray[np.float32], outputs: NDArray[Any], top: NDArray[np.intp], combination: str
) -> NDArray[np.float32]:
    """The class probabilities of these experts' mixture. top: (n, k), best first; returns (n, K)"""
    weights = mixture_weights(np.take_along_axis(scores, top, axis=1))  # (n, k)
    chosen = np.take_along_axis(outputs, top[:, :, None], axis=1)  # (n, k, K)
    return probabilities(mixture(weights, chosen, combination), combination)


def probabilities(combined: NDArray[np.float32], combination: str) -> NDArray[np.float32]:
    """Combined answers as class probabilities: (n, K) -> (n, K)."""
    return combined if combination == "probabilities" else softmax(combined).astype(np.float32)
