"""Runs the three graphs of a bundle. The only module that imports onnxruntime.

Sessions are created from the bytes that bundle/folder.py has verified, never from a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nmoe_edge.bundle.folder import Bundle, read_bundle
from nmoe_edge.bundle.selftest import SelfTestResult, compare_answers
from nmoe_edge.errors import ModelError

_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
}
CPU = "CPUExecutionProvider"
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": CPU}
"""Our name of a provider -> onnxruntime's name, fastest first."""
RUNTIME: str = onnxruntime.__version__
_INSTALL_GPU = "; pip install 'nmoe[edge-gpu]' adds cuda and tensorrt"
_FATAL_ONLY = 4
"""Log level of onnxruntime. It also raises its errors as exceptions, which we report in one line."""


class Graph:
    """One ONNX graph in an onnxruntime session."""

    def __init__(
        self,
        name: str,
        data: bytes,
        row_in: tuple[int, ...],
        row_out: tuple[int, ...],
        threads: int = 1,
        provider: str = CPU,
    ) -> None:
        """Open the graph; ModelError if it does not run here or its shapes differ from the manifest's.

        data: the verified bytes of the file; row_in, row_out: shape of one input and one output row in the manifest;
        threads: CPU threads; provider: onnxruntime's name.
        """
        if hasattr(onnxruntime, "disable_telemetry_events"):
            onnxruntime.disable_telemetry_events()  # newer wheels send usage data by default
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.enable_cpu_mem_arena = False  # the arena would keep the memory of the largest request
        # Waiting threads must not spin: that would keep a small board's cores busy.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The bytes were verified as ONNX; onnxruntime must not read them as its own format.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            providers = [provider] if provider == CPU else [provider, CPU]  # the CPU runs what the GPU cannot
            self._session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:
            raise ModelError(f"{name}: onnxruntime {onnxruntime.__version__} refuses it: {_one_line(error)}") from error
        if provider == CPU:
            # onnxruntime has its own packed copy of the weights; release the file bytes that its Python class keeps.
            # With a GPU they stay: onnxruntime needs them to start again on the CPU after a failure.
            self._session._model_bytes = None
        self._name = name
        self.provider: str = self._session.get_providers()[0]
        """onnxruntime's name of the provider in use."""
        self._input = self._only(self._session.get_inputs(), row_in)
        self._output = self._only(self._session.get_outputs(), row_out).name
        self.dtype = _NUMPY_TYPES[self._input.type]
        """Dtype of the input."""
        if "float" not in self._session.get_outputs()[0].type:
            raise ModelError(f"{name}: returns {self._session.get_outputs()[0].type}; expected floats")

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """(rows, …) -> (rows, …) in float32"""
        try:
            (output,) = self._session.run([self._output], {self._input.name: rows.astype(self.dtype, copy=False)})
        except Exception as error:
            raise ModelError(f"{self._name}: {_one_line(error)}") from error
        if len(output) != len(rows):
            raise ModelError(f"{self._name}: returned {len(output)} rows for {len(rows)}")
        return np.asarray(output, np.float32)

    def _only(self, values: list[Any], row: tuple[int, ...]) -> Any:
        """The only input or output of the graph, checked against `row`, the shape of one row in the manifest."""
        if len(values) != 1 or values[0].type not in _NUMPY_TYPES:
            raise ModelError(
                f"{self._name}: expected one input and one output, of type uint8, int64, float16 or float32"
            )
        (value,) = values
        if not value.shape or isinstance(value.shape[0], int):
            raise ModelError(
                f"{self._name}: {value.name} has a fixed number of rows; export it with an open first dimension"
            )
        dims = tuple(value.shape[1:])
        # An open dimension is a name or None; only a fixed one, an integer, can differ from the manifest.
        same_rank = len(dims) == len(row)
        if not same_rank or any(isinstance(d, int) and d != size for d, size in zip(dims, row, strict=True)):
            raise ModelError(f"{self._name}: {value.name} has rows of {list(dims)}, the manifest says {list(row)}")
        return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class Models:
    """The three graphs of one device's bundle (extractor, gate, own expert), its manifest, statistics and labels."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        provider: str = "cpu",
        on_open: Callable[[str], object] = lambda _graph: None,
    ) -> None:
        """Open the three sessions.

        threads: CPU threads per graph; provider: auto, or a key of PROVIDERS; on_open: called with the name of each
        graph once it is open.
        """
        manifest = bundle.manifest
        self.manifest = manifest
        self.labels = bundle.labels
        self.familiar = bundle.familiar
        """Measures whether a latent is familiar; None where the bundle does not test it."""
        latent = (manifest.latent.dim,)

        def open_graph(name: str, row_in: tuple[int, ...], row_out: tuple[int, ...]) -> Graph:
            file = f"{name}.onnx"
            graph = _open_graph(file, bundle.contents[file], row_in, row_out, threads, provider)
            on_open(name)
            return graph

        self.extractor = open_graph("extractor", manifest.input.shape, latent)
        """inputs (rows, *input) -> latents (rows, latent)"""
        if self.extractor.dtype != np.dtype(manifest.input.dtype):
            raise ModelError(f"extractor.onnx: takes {self.extractor.dtype}, the manifest says {manifest.input.dtype}")
        self.gate = open_graph("gate", latent, (manifest.experts,))
        """latents (rows, latent) -> scores (rows, experts)"""
        self.expert = open_graph("expert", latent, (manifest.outputs,))
        """latents (rows, latent) -> outputs (rows, outputs)"""

    @property
    def provider(self) -> str:
        """onnxruntime's name of the provider that the extractor uses."""
        return self.extractor.provider


def check_installed(provider: str) -> None:
    """Raise ModelError if this onnxruntime was built without the provider (a key of PROVIDERS, or auto).

    Whether it works on this machine is only known once a graph is opened.
    """
    if provider != "auto" and PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise ModelError(f"provider {provider} is not installed{_INSTALL_GPU}")


def _open_graph(
    name: str, data: bytes, row_in: tuple[int, ...], row_out: tuple[int, ...], threads: int, provider: str
) -> Graph:
    """Open a graph on the given provider, or with `auto` on the first that works on this machine."""
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
                continue  # for example no driver for this GPU: try the next provider
            if graph.provider == full:
                return graph
    raise ModelError(f"provider {provider} is installed, but does not work on this machine{_INSTALL_GPU}")


def run_selftest(models: Models, bundle: Bundle) -> SelfTestResult:
    """Run the bundle's self-test on this machine.

    Gate and expert get the exporter's latents, so that a difference in one graph does not affect the others.
    """
    test = bundle.selftest
    latents = models.extractor(test.inputs)
    scores = models.gate(test.latents)
    outputs = models.expert(test.latents)
    return compare_answers(test, bundle.manifest, latents, scores, outputs)


def open_bundle(folder: Path, threads: int, provider: str, force: bool, warn: Callable[[str], None]) -> Models:
    """Verify a bundle, open its sessions and run its self-test.

    ModelError if the self-test fails; with `force`, `warn` gets a warning instead.
    """
    bundle = read_bundle(folder)
    models = Models(bundle, threads, provider)
    result = run_selftest(models, bundle)
    if not result.passed:
        failure = (
            f"{folder}: FAILED its self-test on this machine: latents differ by {result.latent_difference:.2g},"
            f" outputs by {result.output_difference:.2g}; the gate chose other experts for"
            f" {result.other_choices} of {result.rows} inputs"
        )
        if not force:
            raise ModelError(f"{failure}; export it again for this machine, or --force it to serve wrong answers")
        warn(f"{failure}; serving it anyway because of --force")
    return models
