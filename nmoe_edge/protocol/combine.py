"""Combines the answers of several experts.

The weights are the softmax of the gate's scores over the experts that answered. When all of the top-k answered, that is
the paper's definition; otherwise the remaining weights are renormalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.errors import LocalProtocolError

COMBINATIONS = ("outputs", "probabilities")
"""What is summed: the experts' outputs as they are, or the softmax of each."""
_LARGEST = float(np.finfo(np.float32).max)


def softmax(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Along the last axis. scores: finite"""
    scores = np.asarray(scores, np.float64)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def mixture_weights(scores: NDArray[Any]) -> NDArray[np.float32]:
    """The weights of the experts that answered: the softmax of their scores, (…, k) -> (…, k).

    In float32, as a Result carries them.
    """
    return softmax(scores).astype(np.float32)


def mixture(weights: NDArray[Any], answers: NDArray[Any], combination: str) -> NDArray[np.float32]:
    """The weighted sum of answers. weights: (…, k); answers: (…, k, outputs); returns (…, outputs)"""
    chosen = softmax(answers) if combination == "probabilities" else answers.astype(np.float64)
    total = (weights.astype(np.float64)[..., None] * chosen).sum(axis=-2)
    # The largest float32 times weights that sum to 1 + 1e-7 would be infinity.
    mixed: NDArray[np.float32] = np.minimum(np.maximum(total, -_LARGEST), _LARGEST).astype(np.float32)
    return mixed


def expert_weights(scores: NDArray[Any], experts: Sequence[int]) -> dict[int, float]:
    """Expert -> its weight in one row, heaviest first. scores: (experts,), the row's gate scores"""
    if len(experts) == 1:
        return {experts[0]: 1.0}
    ranked = sorted(experts, key=lambda expert: (-scores[expert], expert))
    return dict(zip(ranked, mixture_weights(scores[ranked]).tolist(), strict=True))


def combine(
    answers: Mapping[int, NDArray[Any]], weights: Mapping[int, float], combination: str = "outputs"
) -> NDArray[np.float32]:
    """The weighted sum of one row's answers. answers: expert -> (outputs,); returns (outputs,)"""
    if combination not in COMBINATIONS:
        raise LocalProtocolError(f"combination {combination!r} is not one of {', '.join(COMBINATIONS)}")
    if len(weights) == 1 and combination == "outputs":  # the softmax of one score is 1
        return np.asarray(answers[next(iter(weights))], np.float32)
    chosen = np.stack([answers[expert] for expert in weights])  # (experts, outputs)
    return mixture(np.asarray(list(weights.values())), chosen, combination)
