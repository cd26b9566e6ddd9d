"""What a trained fleet is worth: on each device's own distribution, and on everybody's.

The gate picks, a row whose own expert is sure enough stays at home, the answers are combined, and where the run says
so the device's own class mix is multiplied in. That mix is estimated without labels and from other rows than those it
is applied to: two halves of a device's rows help each other. Thresholds are chosen under the same rules.
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
    """Class probabilities (n, K), and which experts each row went to (n, N), a share each."""
    n, experts = rows.scores.shape
    top = rows.scores.topk(rules.top_k, dim=1)
    classes = rows.expert_outputs.shape[2]
    said = rows.expert_outputs.gather(1, top.indices[:, :, None].expand(-1, -1, classes))  # (n, k, K)
    own = rows.expert_outputs[:, device].softmax(1)
    if rules.combination == "probabilities":
        p = (top.values.softmax(1)[:, :, None] * said.softmax(2)).sum(1)
    else:
        p = (top.values.softmax(1)[:, :, None] * said).sum(1).softmax(1)
    went = torch.zeros(n, experts).scatter_(1, top.indices, 1 / rules.top_k)
    if rules.local_first is not None:
        sure = own.max(1).values > rules.local_first
        p[sure], went[sure] = own[sure], torch.eye(experts)[device]
    return adapted(p, rules), went


def adapted(p: Tensor, rules: Inference) -> Tensor:
    """Times the device's own class mix, each half of the rows with the mix of the other. (n, K) -> (n, K)"""
    if not rules.adapt or len(p) < 2:
        return p
    result = torch.empty_like(p)
    for mine, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        weighed = p[mine] * class_mix(p[other])
        result[mine] = weighed / weighed.sum(1, keepdim=True)
    return result


def class_mix(p: Tensor, steps: int = 30) -> Tensor:
    """The class mix that explains these unlabelled answers best, by EM. (n, K) without a prior -> (K,)"""
    mix = torch.full((p.shape[1],), 1 / p.shape[1])
    for _ in range(steps):
        posterior = p * mix
        mix = (posterior / posterior.sum(1, keepdim=True)).sum(0) + 0.5
        mix = mix / mix.sum()
    return mix


def choose_threshold(own: Sequence[DeviceRows], everybody: Sequence[DeviceRows], rules: Inference) -> float | None:
    """The confidence over which a row stays at home: the best on held-out rows, and of equals what keeps most there.

    own, everybody: for each device its own held-out rows, and all devices'
    """

    def worth(threshold: float | None) -> float:
        tried = replace(rules, local_first=threshold)
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


def measure(p: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, Any]:
    """Accuracy, macro F1 and AUC: the mean of the devices', all rows pooled, and each device's accuracy.

    AUC is None where no device has two classes.
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
    """The fleet as it will run, beside each device on its own. parts: each device's test rows"""
    networked = [answers(rows, i, rules) for i, rows in enumerate(parts)]
    # With the class mix as well: an adjusted expert without it would be compared with its hands tied.
    alone = [adapted(rows.expert_outputs[:, i].softmax(1), rules) for i, rows in enumerate(parts)]
    truth = [rows.y for rows in parts]
    routing = torch.stack([went.mean(0) for _, went in networked])  # (devices, N)
    return {
        "networked": measure([p for p, _ in networked], truth),
        "own_expert": measure(alone, truth),
        "kept_local": routing.diag().mean().item(),
        "asked": float(np.mean([(went[:, i] < 1).float().mean() for i, (_, went) in enumerate(networked)])),
        "routing": routing.tolist(),
        "load": routing.mean(0).tolist(),
    }
