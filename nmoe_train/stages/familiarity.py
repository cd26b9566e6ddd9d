"""What a client's latents look like, so that its device can tell a familiar latent from a new one.

Each client computes its class means and its covariance within classes from its own training rows. A latent's distance
is taken to the nearest class mean, in directions scaled by that covariance (nmoe_edge.protocol.familiar). Nothing
leaves the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.protocol.familiar import Familiar

SHRINK = 0.1
"""How far the covariance is moved towards an even one: a client has few rows; chosen on held-out rows (LOG.md)."""
DIRECTIONS = 64
"""Most directions that are kept. Of more, those in which the client's latents vary most."""
_SMALLEST = 1e-6
"""Smallest variance of a direction beside the mean variance; a client may have one row, or rows that are all equal."""


def familiar_latents(latents: NDArray[Any], y: NDArray[np.int64]) -> Familiar:
    """The statistics of one client. latents: (n, d), at least one row; y: (n,)"""
    h = latents.astype(np.float64)
    classes, position = np.unique(y, return_inverse=True)
    means = np.stack([h[y == k].mean(axis=0) for k in classes])  # (c, d)
    residuals = h - means[position]
    basis = _directions(h)  # (d, r)
    inside = residuals @ basis
    covariance = inside.T @ inside / max(1, len(h) - len(classes))  # (r, r)
    even = np.trace(covariance) / len(covariance)
    overall = h.var(axis=0).mean()  # one row per class has no covariance within classes
    level = even if even > _SMALLEST * overall else max(overall, _SMALLEST)
    covariance = (1 - SHRINK) * covariance + SHRINK * level * np.eye(len(covariance))
    variances, vectors = np.linalg.eigh(covariance)
    whitening = basis @ (vectors / np.sqrt(np.maximum(variances, _SMALLEST * level)))
    return Familiar(whitening.astype(np.float32), (means @ whitening).astype(np.float32))


def _directions(h: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis (d, r) of at most DIRECTIONS directions."""
    dim = h.shape[1]
    if dim <= DIRECTIONS:
        return np.eye(dim)
    _, vectors = np.linalg.eigh(np.cov(h.T, bias=True))
    return vectors[:, -DIRECTIONS:]  # eigenvalues rise
