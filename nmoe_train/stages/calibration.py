"""Calibration: a temperature and a bias per class for every expert, so that its probabilities can be trusted.

    min over s, b   Σ w CE(s H(h) + b + log π, y) + STRENGTH/2 |b|² + 1/2 (s - 1)²

The rows are the held-out rows of all clients, π is their class mix. The bias is kept small, so few rows change little.
A class without rows hardly changes at all: its bias stays near 0. The problem is convex. Newton's method needs only
sums over rows, the gradient and the Hessian: clients can send those instead of their rows.

An expert answers two kinds of rows: any row of its own device, and those that gates send to it. So a row counts with

    w = EVERY_ROW + (1 - EVERY_ROW) · N · (the share of it that the gates send to this expert)

An expert that knows two of ten classes is unsure of most rows, and sure of those it is asked about. With EVERY_ROW = 1
calibration would make it unsure of these too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmoe_edge.protocol.combine import softmax
from nmoe_train.stages.federation import generator
from nmoe_train.stages.losses import SMOOTHING

STRENGTH = 2.0
"""Weight of the bias's square beside the sum over rows; chosen on held-out rows (LOG.md)."""
EVERY_ROW = (1.0, 0.5)
"""Weights of a row that no gate sends to the expert; a run tries each on its held-out rows."""
FOLDS = 5
MIN_ROWS = 4 * FOLDS
"""With fewer rows, experts stay as they are."""
_STEPS = 50
_SMALLEST_SCALE = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What is done with every expert's outputs z before they are used: scale · z + bias."""

    scale: NDArray[np.float32]
    """(N,)"""
    bias: NDArray[np.float32]
    """(N, K)"""

    def __post_init__(self) -> None:
        """ValueError for shapes that do not fit, and for numbers out of range."""
        if self.scale.ndim != 1 or self.bias.ndim != 2 or len(self.scale) != len(self.bias):
            raise ValueError(f"scale is {self.scale.shape} and bias {self.bias.shape}; expected (N,) and (N, K)")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all() and np.isfinite(self.bias).all()):
            raise ValueError("every scale must be over 0, and every number finite")

    def apply(self, outputs: NDArray[Any]) -> NDArray[np.float32]:
        """Every expert's outputs (n, N, K), calibrated."""
        calibrated: NDArray[np.float32] = (outputs * self.scale[:, None] + self.bias).astype(np.float32)
        return calibrated

    @property
    def changes_nothing(self) -> bool:
        return bool((self.scale == 1).all() and (self.bias == 0).all())


def no_calibration(experts: int, classes: int) -> Calibration:
    """The calibration that changes nothing."""
    return Calibration(np.ones(experts, np.float32), np.zeros((experts, classes), np.float32))


def calibration_arrays(experts: Calibration, head: Calibration | None) -> dict[str, NDArray[np.float32]]:
    """As a run stores them."""
    arrays = {"scale": experts.scale, "bias": experts.bias}
    if head is not None:
        arrays |= {"head_scale": head.scale, "head_bias": head.bias}
    # safetensors writes the memory of an array as it lies, also where the array is a view of another one.
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def row_weights(shares: NDArray[Any], every_row: float) -> NDArray[np.float64]:
    """How much each held-out row counts for each expert, (n, N), from the share that each expert gets of it."""
    weights: NDArray[np.float64] = every_row + (1 - every_row) * shares.shape[1] * shares.astype(np.float64)
    return weights / weights.mean(axis=0)


def fit(outputs: NDArray[Any], y: NDArray[np.int64], weights: NDArray[np.float64]) -> tuple[Calibration, int]:
    """The calibration of every expert, and Newton's steps for all of them together.

    outputs: (n, N, K); y: (n,); weights: (n, N), with mean 1 for each expert
    """
    log_mix = _log_mix(y, outputs.shape[2])
    found = [_fit_one(outputs[:, i], y, weights[:, i], log_mix) for i in range(outputs.shape[1])]
    thetas = np.array([theta for theta, _ in found], np.float32)  # (N, 1 + K)
    return Calibration(thetas[:, 0], np.ascontiguousarray(thetas[:, 1:])), sum(steps for _, steps in found)


def bytes_of_step(clients: int, classes: int) -> tuple[int, int]:
    """Bytes that all clients send (loss, gradient, half of the Hessian) and receive (θ) in one step for one expert."""
    numbers = 1 + classes
    return 8 * clients * (1 + numbers + numbers * (numbers + 1) // 2), 8 * clients * numbers


def cross_fitted(
    outputs: NDArray[Any], y: NDArray[np.int64], weights: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float32], int]:
    """Calibrated outputs (n, N, K) in which no row helped to calibrate itself, and Newton's steps."""
    folds = torch.randperm(len(y), generator=generator(seed, "calibration")).numpy() % FOLDS
    calibrated = np.empty(outputs.shape, np.float32)
    all_steps = 0
    for fold in range(FOLDS):
        others = folds != fold
        rest = weights[others] / weights[others].mean(axis=0)
        fitted, steps = fit(outputs[others], y[others], rest)
        calibrated[~others] = fitted.apply(outputs[~others])
        all_steps += steps
    return calibrated, all_steps


def log_likelihood(outputs: NDArray[Any], y: NDArray[np.int64]) -> float:
    """Mean log-probability of the truth over all rows and experts, given the class mix of the rows."""
    p = softmax(outputs + _log_mix(y, outputs.shape[2]))
    rows = np.take_along_axis(p, y[:, None, None], axis=2)
    return float(np.log(np.maximum(rows, 1e-12)).mean())


def _log_mix(y: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    counts = np.bincount(y, minlength=classes) + SMOOTHING
    return np.log(counts / counts.sum())


def _fit_one(
    z: NDArray[Any], y: NDArray[np.int64], weights: NDArray[np.float64], log_mix: NDArray[np.float64]
) -> tuple[NDArray[np.float64], int]:
    """θ = (scale, bias…) of one expert, (1 + K,), by Newton's method with step halving; and its steps. z: (n, K)"""
    z = z.astype(np.float64)
    theta = np.concatenate([[1.0], np.zeros(z.shape[1])])
    loss = _loss(theta, z, y, weights, log_mix)
    steps = 0
    while steps < _STEPS:
        steps += 1
        gradient, hessian = _derivatives(theta, z, y, weights, log_mix)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        after = theta - step
        new_loss = _loss(after, z, y, weights, log_mix)
        while (after[0] < _SMALLEST_SCALE or new_loss > loss) and size > 1e-6:
            size /= 2
            after = theta - size * step
            new_loss = _loss(after, z, y, weights, log_mix)
        if not new_loss < loss - 1e-9 * abs(loss) or after[0] < _SMALLEST_SCALE:
            break
        theta, loss = after, new_loss
    return theta, steps


def _penalty(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the squares of θ - (1, 0, …) are multiplied by."""
    return np.concatenate([[1.0], np.full(len(theta) - 1, STRENGTH)])


def _shift(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """θ - (1, 0, …): how far θ is from changing nothing."""
    return theta - np.eye(1, len(theta))[0]


def _loss(
    theta: NDArray[np.float64],
    z: NDArray[np.float64],
    y: NDArray[np.int64],
    weights: NDArray[np.float64],
    log_mix: NDArray[np.float64],
) -> float:
    logits = theta[0] * z + theta[1:] + log_mix
    highest = logits.max(axis=1)
    log_sums = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    losses = log_sums - np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return float((weights * losses).sum() + (_penalty(theta) * _shift(theta) ** 2).sum() / 2)


def _derivatives(
    theta: NDArray[np.float64],
    z: NDArray[np.float64],
    y: NDArray[np.int64],
    weights: NDArray[np.float64],
    log_mix: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gradient (1 + K,) and Hessian (1 + K, 1 + K) of the loss: sums over rows, which clients can add up."""
    p = softmax(theta[0] * z + theta[1:] + log_mix)  # (n, K)
    weighted = weights[:, None] * p
    residuals = weighted.copy()
    residuals[np.arange(len(y)), y] -= weights
    mean = (p * z).sum(axis=1, keepdims=True)  # (n, 1): the mean of z under p
    across = (weighted * (z - mean)).sum(axis=0)
    gradient = np.concatenate([[(residuals * z).sum()], residuals.sum(axis=0)])
    hessian = np.empty((len(theta), len(theta)))
    hessian[0, 0] = (weighted * z * (z - mean)).sum()
    hessian[0, 1:] = across
    hessian[1:, 0] = across
    hessian[1:, 1:] = np.diag(weighted.sum(axis=0)) - weighted.T @ p
    return gradient + _penalty(theta) * _shift(theta), hessian + np.diag(_penalty(theta))


class Calibrated(nn.Module):
    """A network with its outputs scaled and shifted, for networks that do not end with a linear layer."""

    def __init__(self, net: nn.Module, scale: float, bias: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("bias", bias)

    def forward(self, h: Tensor) -> Tensor:  # (n, d) -> (n, K)
        return self.net(h) * self.scale + self.bias


def calibrated_net(net: nn.Module, scale: float, bias: NDArray[np.float32]) -> nn.Module:
    """A copy of the network with calibrated outputs: folded into its last layer where that is linear."""
    net = copy.deepcopy(net)
    last = net[-1] if isinstance(net, nn.Sequential) and len(net) else net
    added = torch.from_numpy(np.array(bias, np.float32))
    if not isinstance(last, nn.Linear):
        return Calibrated(net, scale, added).eval()
    with torch.no_grad():
        last.weight.mul_(scale)
        shift = added if last.bias is None else last.bias * scale + added
        last.bias = nn.Parameter(shift)
    return net.eval()
