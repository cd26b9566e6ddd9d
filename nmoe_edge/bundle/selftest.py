"""The self-test of a bundle: sample inputs with the answers that the exporter got for them.

This module reads and checks selftest.npz, and compares two sets of answers. models.py runs the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.protocol.routing import route


@dataclass(frozen=True, slots=True, eq=False)
class SelfTest:
    """The arrays of selftest.npz: n sample inputs, and what the exported graphs returned for them at the exporter."""

    inputs: NDArray[Any]
    """(n, *input shape)"""
    latents: NDArray[np.float32]
    """(n, latent): output of the extractor for `inputs`"""
    experts: NDArray[np.int64]
    """(n, k): experts that the gate chose for `latents`, the best first"""
    outputs: NDArray[np.float32]
    """(n, outputs): output of this device's own expert for `latents`"""
    latent_tolerance: NDArray[np.float64]
    """(): largest absolute difference of the latents that passes on another CPU"""
    output_tolerance: NDArray[np.float64]
    """(): largest absolute difference of the outputs that passes on another CPU"""

    def write(self) -> bytes:
        """Encode as selftest.npz."""
        return write_npz({field.name: getattr(self, field.name) for field in fields(self)})


def parse_selftest(data: bytes, manifest: Manifest) -> SelfTest:
    """Decode selftest.npz; ValueError unless dtypes, shapes and ranges of its arrays follow from the manifest."""
    arrays = read_npz(data)
    names = [field.name for field in fields(SelfTest)]
    if sorted(arrays) != sorted(names):
        raise ValueError(f"the arrays are {', '.join(sorted(arrays))}; expected {', '.join(names)}")
    rows = arrays["inputs"].shape[0] if arrays["inputs"].ndim else 0
    if rows < 1:
        raise ValueError("no inputs")
    expected = {
        "inputs": (np.dtype(manifest.input.dtype), (rows, *manifest.input.shape)),
        "latents": (np.dtype("<f4"), (rows, manifest.latent.dim)),
        "experts": (np.dtype("<i8"), (rows, manifest.routing.top_k)),
        "outputs": (np.dtype("<f4"), (rows, manifest.outputs)),
        "latent_tolerance": (np.dtype("<f8"), ()),
        "output_tolerance": (np.dtype("<f8"), ()),
    }
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(f"{name} is {array.dtype} {array.shape}; expected {dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity")
    if min(arrays["latent_tolerance"], arrays["output_tolerance"]) < 0:
        raise ValueError("a tolerance is less than 0")
    if arrays["experts"].min() < 0 or arrays["experts"].max() >= manifest.experts:
        raise ValueError(f"experts contains a number that is not in 0..{manifest.experts - 1}")
    return SelfTest(**arrays)


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """How far this machine's answers are from the exporter's."""

    rows: int
    """Sample inputs compared."""
    latent_difference: float
    """Largest absolute difference of the latents."""
    output_difference: float
    """Largest absolute difference of the expert's outputs."""
    other_choices: int
    """Rows for which the gate chose other experts, or the same experts in another order."""
    passed: bool
    """Whether both differences are within the tolerances and the gate made the same choices."""


def compare_answers(
    test: SelfTest,
    manifest: Manifest,
    latents: NDArray[np.float32],
    scores: NDArray[np.float32],
    outputs: NDArray[np.float32],
) -> SelfTestResult:
    """Compare this machine's answers with the exporter's.

    latents: (n, latent), the extractor's output for test.inputs; scores: (n, experts), the gate's for test.latents;
    outputs: (n, outputs), the expert's for test.latents.
    """
    every_expert = range(manifest.experts)
    chosen = route(scores, manifest.expert, every_expert, manifest.routing.top_k).chosen
    expected = test.experts.tolist()
    other_choices = sum(mine != tuple(theirs) for mine, theirs in zip(chosen, expected, strict=True))
    latent_difference = float(np.abs(latents - test.latents).max())
    output_difference = float(np.abs(outputs - test.outputs).max())
    # With <= a NaN from this machine fails.
    latents_agree = latent_difference <= test.latent_tolerance
    outputs_agree = output_difference <= test.output_tolerance
    return SelfTestResult(
        rows=len(test.inputs),
        latent_difference=latent_difference,
        output_difference=output_difference,
        other_choices=other_choices,
        passed=bool(latents_agree and outputs_agree) and other_choices == 0,
    )
