"""How far a latent is from what a device's own expert was trained on.

An expert can be confident about a class that it has never seen. So the confidence exit also tests the distance: from
the nearest of the client's class means, in directions scaled by the client's covariance within classes. Training
computes both and chooses the largest distance that is still familiar.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DIRECTIONS = 256
"""A device computes the directions of every latent: more would take longer than its expert."""
MAX_CENTRES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Familiar:
    """The statistics of one client's latents. ValueError for shapes that do not fit, too many numbers, NaN or infinity.

    Familiar(np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32)).distances(np.ones((1, 2)))  # [2.0]
    """

    whitening: NDArray[np.float32]
    """(d, r): a latent times this has unit covariance within classes; at most MAX_DIRECTIONS directions"""
    centres: NDArray[np.float32]
    """(c, r): the class means in these directions; 1 to MAX_CENTRES"""
    _twice_centres: NDArray[np.float64] = field(init=False, repr=False)
    """(r, c)"""
    _lengths: NDArray[np.float64] = field(init=False, repr=False)
    """(c,): the squared length of each centre"""

    def __post_init__(self) -> None:
        for name in ("whitening", "centres"):
            array = getattr(self, name)
            if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; expected float32 with two dimensions")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} contains NaN or infinity")
        directions = self.whitening.shape[1]
        if self.centres.shape[1] != directions:
            raise ValueError(f"centres is {self.centres.shape}; expected {directions} columns, as whitening has")
        if directions > MAX_DIRECTIONS:
            raise ValueError(f"whitening has {directions} directions, more than {MAX_DIRECTIONS}")
        if len(self.centres) > MAX_CENTRES:
            raise ValueError(f"there are {len(self.centres)} centres, more than {MAX_CENTRES}")
        centres = self.centres.astype(np.float64)
        object.__setattr__(self, "_twice_centres", 2 * centres.T)
        object.__setattr__(self, "_lengths", (centres * centres).sum(axis=1))

    def distances(self, latents: NDArray[Any]) -> NDArray[np.float64]:
        """The squared distance of each latent from the nearest centre: (n, d) -> (n,).

        Infinity where a number gets too large.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            whitened = (np.asarray(latents, np.float32) @ self.whitening).astype(np.float64)  # (n, r)
            # |h - c|² = |h|² + (|c|² - 2 h·c), and the nearest centre has the smallest bracket.
            brackets = self._lengths - whitened @ self._twice_centres  # (n, c)
            distances = (whitened * whitened).sum(axis=1) + brackets.min(axis=1)
        distances[np.isnan(distances)] = np.inf
        nearest: NDArray[np.float64] = np.maximum(distances, 0.0)
        return nearest
