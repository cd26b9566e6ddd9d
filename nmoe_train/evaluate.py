"""What a trained fleet is worth: on each device's own distribution, and on everybody's.

The gate picks, a row whose own expert is sure enough stays at home, the answers are combined, and the device's own
class mix is multiplied in when there are rows enough to estimate it: from the very rows that are scored, without
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LEAST_ROWS = 200
"""Rows of traffic before a device trusts its estimate of its own class mix."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a device does with scores and answers."""

    top_k: int
    combination: str
    local_first: float | None
    adapt: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Samples as one device sees them."""

    scores: Tensor
    """(n, N): its gate's"""
    outputs: Tensor
    """(n, N, K): every expert's, the same for every device"""
    y: Tensor
    """(n,)"""


def answers(rows: Rows, device: int, rules: Rules) -> tuple[Tensor, Tensor]:
    """Class probabilities (n, K), and which experts each row went to (n, N), a share each."""
    n, experts = rows.scores.shape
    kept = torch.full((n, experts), -torch.inf)
    top = rows.scores.topk(rules.top_k, dim=1)
    kept.scatter_(1, top.indices, top.values)
    weights = kept.softmax(1)  # (n, N): zero for whom the gate did not pick
    if rules.local_first is not None:
        sure = rows.outputs[:, device].softmax(1).max(1).values > rules.local_first
        weights[sure] = torch.eye(experts)[device]
    mixed = rows.outputs.softmax(2) if rules.combination == "probabilities" else rows.outputs
    p = (weights[:, :, None] * mixed).sum(1)
    if rules.combination == "outputs":
        p = p.softmax(1)
    return _adapted(p, rules), (weights > 0).float() / (weights > 0).sum(1, keepdim=True)


def _adapted(p: Tensor, rules: Rules) -> Tensor:
    """Times the device's own class mix, when it has rows enough to estimate it. (n, K) -> (n, K)"""
    if not rules.adapt or len(p) < LEAST_ROWS:
        return p
    p = p * class_mix(p)
    return p / p.sum(1, keepdim=True)


def class_mix(p: Tensor, steps: int = 30) -> Tensor:
    """The class mix that explains these unlabelled answers best, by EM. (n, K) without a prior -> (K,)"""
    mix = torch.full((p.shape[1],), 1 / p.shape[1])
    for _ in range(steps):
        posterior = p * mix
        mix = (posterior / posterior.sum(1, keepdim=True)).sum(0) + 0.5
        mix = mix / mix.sum()
    return mix


def choose_threshold(own: Sequence[Rows], everybody: Sequence[Rows], rules: Rules) -> float | None:
    """The confidence over which a row stays at home: the best on held-out rows, and of equals what keeps most there.

    own, everybody: for each device its own held-out rows, and all devices'
    """

    def worth(threshold: float | None) -> float:
        tried = Rules(rules.top_k, rules.combination, threshold, rules.adapt)
        return float(
            np.mean([accuracy(answers(r, i, tried)[0], r.y) for part in (own, everybody) for i, r in enumerate(part)])
        )

    worths = {threshold: worth(threshold) for threshold in (*THRESHOLDS, None)}
    best = max(worths.values())
    return next(threshold for threshold, value in worths.items() if value == best)


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of rows whose largest entry is the truth."""
    return (p.argmax(1) == y).float().mean().item()


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Mean F1 over all classes; of a class that is neither there nor predicted it is zero, as in the paper's tables."""
    table = torch.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes).double()
    hits, true, said = table.diag(), table.sum(1), table.sum(0)
    return (2 * hits / (true + said).clamp(min=1)).mean().item()


def auc(p: Tensor, y: Tensor) -> float | None:
    """One-vs-rest area under the curve, the mean over the classes that these rows both have and have not."""
    from sklearn.metrics import roc_auc_score

    present = [k for k in range(p.shape[1]) if 0 < int((y == k).sum()) < len(y)]
    return float(np.mean([roc_auc_score(y.numpy() == k, p[:, k].numpy()) for k in present])) if present else None


def measure(p: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, float | None]:
    """Accuracy, macro F1 and AUC of each device, averaged; no AUC where no device has two classes."""
    classes = p[0].shape[1]
    pairs = list(zip(p, y, strict=True))
    areas = [area for area in (auc(a, b) for a, b in pairs) if area is not None]
    return {
        "accuracy": float(np.mean([accuracy(a, b) for a, b in pairs])),
        "macro_f1": float(np.mean([macro_f1(a.argmax(1), b, classes) for a, b in pairs])),
        "auc": float(np.mean(areas)) if areas else None,
    }


def evaluate(own: Sequence[Rows], everybody: Sequence[Rows], rules: Rules) -> dict[str, Any]:
    """The fleet as it will run, beside each device on its own.

    own, everybody: for each device its own test rows, and the balanced test set
    """
    result: dict[str, Any] = {}
    for name, parts in (("own", own), ("iid", everybody)):
        networked = [answers(rows, i, rules) for i, rows in enumerate(parts)]
        # With the class mix as well: an adjusted expert without it would be compared with its hands tied.
        alone = [_adapted(rows.outputs[:, i].softmax(1), rules) for i, rows in enumerate(parts)]
        truth = [rows.y for rows in parts]
        routing = torch.stack([went.mean(0) for _, went in networked])  # (devices, N)
        result[name] = {
            "networked": measure([p for p, _ in networked], truth),
            "own_expert": measure(alone, truth),
            "kept_local": routing.diag().mean().item(),
            "routing": routing.tolist(),
        }
    return result
