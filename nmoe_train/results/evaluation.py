"""Figures of a trained fleet: on each device's own distribution, and on the balanced test set.

Answering is nmoe_edge.protocol.answering, the code that devices run. The gate picks experts for a row, unless the
device's own expert is confident and the latent is familiar; the answers are combined; then the device's class mix is
multiplied in. The class mix is estimated without labels, for each half of a device's rows from the other half. No
figure depends on the order of the rows. rules.py chooses the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmoe_edge.protocol.answering import Answered, answer
from nmoe_edge.protocol.classmix import cross_adapted
from nmoe_edge.protocol.combine import softmax
from nmoe_train.run import Inference

SEED = 0
"""Of the draw that cuts a device's rows into halves for the class mix."""
SHORT = ("accuracy", "macro_f1", "auc")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """One device's rows: its gate's scores, every expert's outputs and the true classes."""

    scores: Tensor
    """(n, N) of this device's gate"""
    expert_outputs: Tensor
    """(n, N, K) of every expert, calibrated; two devices get the same numbers for the same row"""
    y: Tensor
    """True classes (n,)"""
    distances: Tensor | None = None
    """(n,) of the latents from what the own expert knows; None where no rule tests them"""


def answers(rows: DeviceRows, device: int, rules: Inference) -> tuple[Tensor, Tensor]:
    """Class probabilities (n, K), and the share of each row that went to each expert (n, N); its rows sum to 1."""
    answered = _answered(rows, device, rules)
    return apply_class_mix(torch.from_numpy(answered.p), rules), torch.from_numpy(answered.routed)


def apply_class_mix(p: Tensor, rules: Inference) -> Tensor:
    """Multiply in the device's class mix, where the rules adapt. (n, K) -> (n, K)"""
    return class_mixed(p) if rules.adapt else p


def class_mixed(p: Tensor) -> Tensor:
    """Probabilities times the device's class mix: each half of the rows gets the mix of the other half."""
    return torch.from_numpy(cross_adapted(p.numpy(), SEED))


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
    areas = [_area(p[:, k].numpy(), (y == k).numpy()) for k in range(p.shape[1]) if 0 < int((y == k).sum()) < len(y)]
    return float(np.mean(areas)) if areas else None


def _area(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """The chance that a positive row scores higher than a negative one; equal scores count half."""
    negative = np.sort(scores[~positive])
    below = np.searchsorted(negative, scores[positive], "left")
    not_above = np.searchsorted(negative, scores[positive], "right")
    return float((below + not_above).mean() / 2 / len(negative))


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


def measure_both(p: Sequence[Tensor], y: Sequence[Tensor], adapt: bool) -> dict[str, Any]:
    """`measure` with the class mix if `adapt`, and in short both with and without it.

    p: each device's class probabilities (n, K), without a prior of its client
    """
    without = measure(p, y)
    mixed = measure([class_mixed(q) for q in p], y)
    return {
        **(mixed if adapt else without),
        "class_mix": adapt,
        "with_class_mix": {key: mixed[key] for key in SHORT},
        "without_class_mix": {key: without[key] for key in SHORT},
    }


def evaluate(
    parts: Sequence[DeviceRows], rules: Inference, prior: bool = False, seen: Tensor | None = None
) -> dict[str, Any]:
    """Figures of the fleet and of each expert alone, and the routing between devices; RUN.md explains the keys.

    parts: each device's test rows
    prior: whether answers carry their client's class mix; there is then no figure with the class mix
    seen: (devices, K), whether the device's client has training samples of the class
    """
    answered = [_answered(rows, i, rules) for i, rows in enumerate(parts)]
    truth = [rows.y for rows in parts]
    networked = [torch.from_numpy(one.p) for one in answered]
    alone = [torch.from_numpy(softmax(rows.expert_outputs[:, i].numpy())).float() for i, rows in enumerate(parts)]
    routing = torch.stack([torch.from_numpy(one.routed).mean(0) for one in answered])  # (devices, N)
    asked = [float((one.routed[:, i] < 1).mean()) for i, one in enumerate(answered)]
    figures = {
        "networked": measure(networked, truth) if prior else measure_both(networked, truth, rules.adapt),
        "own_expert": measure(alone, truth) if prior else measure_both(alone, truth, rules.adapt),
        "kept_local": routing.diag().mean().item(),
        "asked": float(np.mean(asked)),
        "routing": routing.tolist(),
        "load": routing.mean(0).tolist(),
    }
    unseen = _unseen(parts, answered, seen) if seen is not None and rules.local_first is not None else None
    return figures | ({"unseen": unseen} if unseen else {})


def _unseen(parts: Sequence[DeviceRows], answered: Sequence[Answered], seen: Tensor) -> dict[str, Any] | None:
    """What the local exit does with rows of classes that the device's client has no sample of; None without such rows.

    `kept`: the share of them that is answered locally; `right`: how many of those are right, None if none is kept
    """
    local = []
    right = []
    for i, (rows, one) in enumerate(zip(parts, answered, strict=True)):
        unknown = ~seen[i][rows.y].numpy()
        local.append(one.local[unknown])
        right.append(one.p.argmax(axis=1)[unknown] == rows.y.numpy()[unknown])
    kept = np.concatenate(local)
    if not len(kept):
        return None
    return {
        "rows": len(kept),
        "kept": float(kept.mean()),
        "right": float(np.concatenate(right)[kept].mean()) if kept.any() else None,
    }


def _answered(rows: DeviceRows, device: int, rules: Inference) -> Answered:
    """The device's answers before the class mix."""
    distances = None if rows.distances is None else rows.distances.numpy()
    return answer(rows.scores.numpy(), rows.expert_outputs.numpy(), device, rules.answer_rules(), distances)
