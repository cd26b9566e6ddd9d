"""familiar.npz: the statistics of the latents that a device's own expert was trained on.

The confidence exit measures with them whether a latent is familiar. protocol/familiar.py computes the distances.
"""

from __future__ import annotations

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.protocol.familiar import Familiar

_ARRAYS = ("centres", "whitening")


def write_statistics(familiar: Familiar) -> bytes:
    """Encode as familiar.npz."""
    return write_npz({name: getattr(familiar, name) for name in _ARRAYS})


def parse_statistics(data: bytes, manifest: Manifest) -> Familiar:
    """Decode familiar.npz; ValueError unless its arrays fit each other, the manifest and the limits of Familiar."""
    arrays = read_npz(data)
    if sorted(arrays) != list(_ARRAYS):
        raise ValueError(f"the arrays are {', '.join(sorted(arrays))}; expected {', '.join(_ARRAYS)}")
    familiar = Familiar(**arrays)
    if len(familiar.whitening) != manifest.latent.dim:
        raise ValueError(
            f"whitening has {len(familiar.whitening)} rows; expected {manifest.latent.dim}, the numbers in a latent"
        )
    return familiar
