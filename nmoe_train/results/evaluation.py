"""Figures of a trained fleet: on each device's own distribution, and on the balanced test set.

Answering follows the rules of the run. The gate picks experts for a row, unless the device's own expert is confident
enough to answer locally; the answers are combined; then the device's class mix is multiplied in. The class mix is
estimated without labels, for each half of a device's rows from the other half. The confidence threshold is chosen under
the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmoe_train.run import Inference

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences that choose_threshold tries, from most to fewest rows answered locally."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """One device's rows: its gate's scores, every expert's outputs and the true classes."""

    scores: Tensor
    """(n, N) of this device's gate"""
    expert_outputs: Tensor
    """(n, N, K) of every expert; two devices get the same numbers for the same row"""
    y: Tensor
    """True classes (n,)"""


def answers(rows: DeviceRows, device: int, rules: Inference) -> tuple[Tensor, Tensor]:
    """Class probabilities (n, K), and the share of each row that went to each expert (n, N); its rows sum to 1."""
    n, experts = rows.scores.shape
    classes = rows.expert_outputs.shape[2]
    top = rows.scores.topk(rules.top_k, dim=1)
    outputs = rows.expert_outputs.gather(1, top.indices[:, :, None].expand(-1, -1, classes))  # (n, k, K)
    weights = top.values.softmax(1)[:, :, None]  # (n, k, 1)
    if rules.combination == "probabilities":
        p = (weights * outputs.softmax(2)).sum(1)
    else:
        p = (weights * outputs).sum(1).softmax(1)
    routed = torch.zeros(n, experts).scatter_(1, top.indices, 1 / rules.top_k)
    if rules.local_first is not None:
        own = rows.expert_outputs[:, device].softmax(1)
        confident = own.max(1).values > rules.local_first
        p[confident] = own[confident]
        routed[confident] = torch.eye(experts)[device]
    return apply_class_mix(p, rules), routed


def apply_class_mix(p: Tensor, rules: Inference) -> Tensor:
    """Multiply in the device's class mix, where the rules adapt. (n, K) -> (n, K)

    Even rows get the mix estimated from odd rows, and odd rows the one from even rows.
    """
    if not rules.adapt or len(p) < 2:
        return p
    result = torch.empty_like(p)
    even = slice(0, None, 2)
    odd = slice(1, None, 2)
    for half, other in ((even, odd), (odd, even)):
        weighted = p[half] * class_mix(p[other])
        result[half] = weighted / weighted.sum(1, keepdim=True)
    return result


def class_mix(p: Tensor, steps: int = 30) -> Tensor:
    """The class mix that best explains these unlabelled probabilities, by EM. (n, K) without a prior -> (K,)

    Each step adds half a row to every class, so that an absent class keeps a small share.
    """
    mix = torch.full((p.shape[1],), 1 / p.shape[1])
    for _ in range(steps):
        posterior = p * mix
        mix = (posterior / posterior.sum(1, keepdim=True)).sum(0) + 0.5
        mix = mix / mix.sum()
    return mix


def choose_threshold(own: Sequence[DeviceRows], pooled: Sequence[DeviceRows], rules: Inference) -> float | None:
    """The confidence above which a row is answered locally; None: the gate alone decides.

    Of THRESHOLDS and None, it is the one with the best mean accuracy over all devices, on their own rows and on the
    pooled ones. Among equals, it is the one that answers most rows locally.

    own: each device's held-out rows
    pooled: for each device, the held-out rows of all devices
    """

    def mean_accuracy(threshold: float | None) -> float:
        tried = replace(rules, local_first=threshold)
        accuracies = []
        for part in (own, pooled):
            for device, rows in enumerate(part):
                p, _ = answers(rows, device, tried)
                accuracies.append(accuracy(p, rows.y))
        return float(np.mean(accuracies))

    candidates = (*THRESHOLDS, None)  # in the order of preference among equals
    return max(candidates, key=mean_accuracy)


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of rows in which the true class has the largest entry."""
    return (p.argmax(1) == y).float().mean().item()


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Mean F1 over all classes. A class that occurs in neither `predicted` nor `y` counts as 0, as in the paper."""
    table = torch.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes).double()
    hits = table.diag()
    true_counts = table.sum(1)
    predicted_counts = table.sum(0)
    return (2 * hits / (true_counts + predicted_counts).clamp(min=1)).mean().item()


def auc(p: Tensor, y: Tensor) -> float | None:
    """One-vs-rest area under the ROC curve, averaged over the classes that have both positive and negative rows.

    None when there is no such class.
    """
    from sklearn.metrics import roc_auc_score

    areas = []
    for k in range(p.shape[1]):
        positive = y == k
        if 0 < int(positive.sum()) < len(y):
            areas.append(roc_auc_score(positive.numpy(), p[:, k].numpy()))
    return float(np.mean(areas)) if areas else None


def measure(p: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, Any]:
    """Accuracy, macro F1 and AUC as the mean over devices and over all rows pooled, and each device's accuracy.

    p: each device's class probabilities (n, K)
    y: each device's true classes (n,)

    AUC is None when no device has rows of two classes.
    """
    each = [_figures(a, b) for a, b in zip(p, y, strict=True)]
    areas = [figures["auc"] for figures in each if figures["auc"] is not None]
    return {
        "accuracy": float(np.mean([figures["accuracy"] for figures in each])),
        "macro_f1": float(np.mean([figures["macro_f1"] for figures in each])),
        "auc": float(np.mean(areas)) if areas else None,
        "pooled": _figures(torch.cat(list(p)), torch.cat(list(y))),
        "devices": [figures["accuracy"] for figures in each],
    }


def _figures(p: Tensor, y: Tensor) -> dict[str, float | None]:
    return {"accuracy": accuracy(p, y), "macro_f1": macro_f1(p.argmax(1), y, p.shape[1]), "auc": auc(p, y)}


def evaluate(parts: Sequence[DeviceRows], rules: Inference) -> dict[str, Any]:
    """Figures of the fleet and of each expert alone, and the routing between devices; RUN.md explains the keys.

    parts: each device's test rows
    """
    networked = [answers(rows, i, rules) for i, rows in enumerate(parts)]
    # Experts alone get the class mix too: without it, the comparison would be unfair to adjusted experts.
    alone = [apply_class_mix(rows.expert_outputs[:, i].softmax(1), rules) for i, rows in enumerate(parts)]
    truth = [rows.y for rows in parts]
    routing = torch.stack([routed.mean(0) for _, routed in networked])  # (devices, N)
    asked = [(routed[:, i] < 1).float().mean() for i, (_, routed) in enumerate(networked)]
    return {
        "networked": measure([p for p, _ in networked], truth),
        "own_expert": measure(alone, truth),
        "kept_local": routing.diag().mean().item(),
        "asked": float(np.mean(asked)),
        "routing": routing.tolist(),
        "load": routing.mean(0).tolist(),
    }
