"""A bundle's three graphs, ready to run: the only importer of onnxruntime.

A session is made of bytes that bundle.py has verified, never of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nmoe_edge.bundle.folder import Bundle, read_bundle
from nmoe_edge.errors import ModelError
from nmoe_edge.protocol.routing import route

_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
}
CPU = "CPUExecutionProvider"
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": CPU}
"""Ours -> onnxruntime's name, the fastest first."""
RUNTIME: str = onnxruntime.__version__
_BRINGS = "; pip install 'nmoe[edge-gpu]' brings cuda and tensorrt"
_FATAL_ONLY = 4
"""onnxruntime's log level: what goes wrong is raised as well, and said by us in one line."""


class Graph:
    """One graph: rows in, rows out."""

    def __init__(
        self,
        name: str,
        data: bytes,
        row_in: tuple[int, ...],
        row_out: tuple[int, ...],
        threads: int = 1,
        provider: str = CPU,
    ) -> None:
        """`row_in` and `row_out` are what the manifest says of a row; a graph of other shapes is refused."""
        if hasattr(onnxruntime, "disable_telemetry_events"):
            onnxruntime.disable_telemetry_events()  # newer wheels report home, and a device has nothing to report
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.enable_cpu_mem_arena = False  # it keeps what the largest request took
        # An idle pool that spins burns a small board's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What was verified as ONNX is not to be taken for anything else.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            providers = [provider] if provider == CPU else [provider, CPU]  # what a GPU cannot do, the CPU does
            self._session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:
            raise ModelError(f"{name}: onnxruntime {onnxruntime.__version__} refuses it: {_one_line(error)}") from error
        if provider == CPU:  # a GPU that fails would start anew from them
            self._session._model_bytes = None  # the whole file, which Python's session keeps beside its own weights
        self._name = name
        self.provider: str = self._session.get_providers()[0]
        """What it runs on."""
        self._input = self._only(self._session.get_inputs(), row_in)
        self._output = self._only(self._session.get_outputs(), row_out).name
        self.dtype = _NUMPY_TYPES[self._input.type]
        """What it takes."""
        if "float" not in self._session.get_outputs()[0].type:
            raise ModelError(f"{name}: puts out {self._session.get_outputs()[0].type}, not floats")

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """(rows, …) -> (rows, …) in float32"""
        try:
            (output,) = self._session.run([self._output], {self._input.name: rows.astype(self.dtype, copy=False)})
        except Exception as error:
            raise ModelError(f"{self._name}: {_one_line(error)}") from error
        if len(output) != len(rows):
            raise ModelError(f"{self._name}: {len(output)} rows came of {len(rows)}")
        return np.asarray(output, np.float32)

    def _only(self, values: list[Any], row: tuple[int, ...]) -> Any:
        if len(values) != 1 or values[0].type not in _NUMPY_TYPES:
            raise ModelError(f"{self._name}: a graph has one tensor in and one out, of a type that rows can have")
        (value,) = values
        if not value.shape or isinstance(value.shape[0], int):
            raise ModelError(f"{self._name}: {value.name} has a fixed number of rows; the first dimension stays open")
        dims = tuple(value.shape[1:])
        # A dimension that the graph leaves open is a name; only those that it fixes can disagree.
        if len(dims) != len(row) or any(isinstance(d, int) and d != due for d, due in zip(dims, row, strict=True)):
            raise ModelError(f"{self._name}: {value.name} has rows of {list(dims)}, the manifest says {list(row)}")
        return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class Models:
    """Extractor, gate and the personal expert of one device, and what their bundle says of them."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        provider: str = "cpu",
        on_open: Callable[[str], object] = lambda _graph: None,
    ) -> None:
        """Open the three sessions; provider: auto, or one of PROVIDERS; on_open: told of each that is open."""
        manifest = self.manifest = bundle.manifest
        self.labels = bundle.labels
        latent, graphs = (manifest.latent.dim,), bundle.contents

        def opened(name: str, row_in: tuple[int, ...], row_out: tuple[int, ...]) -> Graph:
            graph = _opened(f"{name}.onnx", graphs[f"{name}.onnx"], row_in, row_out, threads, provider)
            on_open(name)
            return graph

        self.extractor = opened("extractor", manifest.input.shape, latent)
        """inputs (rows, *input) -> latents (rows, latent)"""
        if self.extractor.dtype != np.dtype(manifest.input.dtype):
            raise ModelError(f"extractor.onnx: takes {self.extractor.dtype}, the manifest says {manifest.input.dtype}")
        self.gate = opened("gate", latent, (manifest.experts,))
        """latents (rows, latent) -> scores (rows, experts)"""
        self.expert = opened("expert", latent, (manifest.outputs,))
        """latents (rows, latent) -> outputs (rows, outputs)"""

    @property
    def provider(self) -> str:
        """What the extractor runs on."""
        return self.extractor.provider


def check_installed(provider: str) -> None:
    """Refuse a provider that this onnxruntime does not have; whether the machine does shows when a graph is opened."""
    if provider != "auto" and PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise ModelError(f"provider {provider} is not installed{_BRINGS}")


def _opened(
    name: str, data: bytes, row_in: tuple[int, ...], row_out: tuple[int, ...], threads: int, provider: str
) -> Graph:
    """A graph on the provider that was asked for, or with `auto` on the first that this machine has."""
    check_installed(provider)
    installed = onnxruntime.get_available_providers()
    wanted = list(PROVIDERS) if provider == "auto" else [provider]
    for short in wanted:
        full = PROVIDERS[short]
        if full in installed:
            try:
                graph = Graph(name, data, row_in, row_out, threads, full)
            except ModelError:
                if short == wanted[-1]:
                    raise
                continue  # what a GPU cannot do, or has no driver for, the next may
            if graph.provider == full:
                return graph
    raise ModelError(f"provider {provider} is installed, but not to be had on this machine{_BRINGS}")


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """How this machine's answers compare with the exporter's."""

    rows: int
    latent_difference: float
    """Largest absolute difference."""
    output_difference: float
    """The same, of the expert fed with the exporter's latents."""
    other_choices: int
    """Rows for which the gate chose other experts."""
    passed: bool


def run_selftest(models: Models, bundle: Bundle) -> SelfTestResult:
    """Replay the bundle's self-test on this very machine.

    Gate and expert get the exporter's latents, so that each graph answers for itself.
    """
    test, manifest = bundle.selftest, bundle.manifest
    latents, outputs = models.extractor(test.inputs), models.expert(test.latents)
    everyone = range(manifest.experts)
    chosen = route(models.gate(test.latents), manifest.expert, everyone, manifest.routing.top_k).chosen
    other_choices = sum(mine != tuple(theirs) for mine, theirs in zip(chosen, test.experts.tolist(), strict=True))
    latent_difference = float(np.abs(latents - test.latents).max())
    output_difference = float(np.abs(outputs - test.outputs).max())
    # So written, a NaN on this machine does not pass.
    passed = latent_difference <= test.latent_tolerance and output_difference <= test.output_tolerance
    return SelfTestResult(
        len(test.inputs), latent_difference, output_difference, other_choices, bool(passed) and other_choices == 0
    )


def open_bundle(folder: Path, threads: int, provider: str, force: bool, say: Callable[[str], None]) -> Models:
    """Verify a bundle, open its sessions and replay its self-test; ModelError where this machine answers otherwise.

    With `force` that is said, and no error.
    """
    bundle = read_bundle(folder)
    models = Models(bundle, threads, provider)
    result = run_selftest(models, bundle)
    if not result.passed:
        what = (
            f"{folder}: FAILED its self-test on this machine: latents differ by {result.latent_difference:.2g},"
            f" outputs by {result.output_difference:.2g}, {result.other_choices} other choices of the gate"
        )
        if not force:
            raise ModelError(f"{what}; export it again for this machine, or --force it to serve wrong answers")
        say(f"{what}; SERVING ALL THE SAME, as --force says")
    return models
