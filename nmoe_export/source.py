"""What is to be exported: a training run, or anybody's own modules with samples of what they see."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nmoe_edge.bundle.manifest import InputSpec, sha256
from nmoe_edge.common.imports import import_path
from nmoe_edge.common.text import counted
from nmoe_export.errors import SourceError
from nmoe_train.run import Inference, Run, RunRecord

PROBES = 32
"""Samples that modules are tried with."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A fleet before it is exported."""

    key: str
    """Digest of everything that is in it: two sources with one key are the same."""
    extractor: nn.Module
    gates: Sequence[nn.Module]
    """One that all share, or one a device."""
    experts: Sequence[nn.Module]
    inputs: NDArray[Any]
    """Samples (n, …): one half of them is shown, the other measures."""
    samples: Literal["held_out", "samples_given"]
    """What they are called: a run knows that nothing was trained on them, of somebody's modules nobody said so."""
    labels: NDArray[np.int64] | None
    """(n,)"""
    clients: NDArray[np.int64] | None
    """Whose each sample is (n,)"""
    input: InputSpec
    latent_dim: int
    outputs: int
    names: tuple[str, ...] | None
    """Of the outputs."""
    inference: Inference
    answers_carry_prior: bool
    extractor_source: str
    """Digest of the extractor as it was trained."""
    alike: bool
    """Whether gates and experts are of one build each, so that one graph serves all of a kind."""

    @property
    def shown(self) -> NDArray[np.int64]:
        """The samples that calibrate and that thresholds are chosen on."""
        return np.flatnonzero(self._halves() == 1)

    @property
    def measured(self) -> NDArray[np.int64]:
        """The others: what is said of the graphs is measured on samples that had no part in making them."""
        return np.flatnonzero(self._halves() == 0)

    def _halves(self) -> NDArray[np.int64]:
        """Of each client's samples every second one is a 1 (n,)"""
        halves = np.arange(len(self.inputs)) % 2
        for client in () if self.clients is None else np.unique(self.clients):
            rows = np.flatnonzero(self.clients == client)
            halves[rows] = np.arange(len(rows)) % 2
        return halves


def of_run(run: Run) -> Source:
    """The fleet of a training run."""
    record, arrays = run.record, run.calibration()
    inputs = arrays["inputs"]
    span = (0.0, 255.0) if record.data.dtype == "uint8" else (float(inputs.min()), float(inputs.max()) + 1e-6)
    resize: Literal["exact", "stretch"] = "exact" if record.data.layout == "none" else "stretch"
    owners = range(record.experts if record.personal_gates else 1)
    return Source(
        key=key_of(run),
        extractor=run.extractor(),
        gates=[run.gate(device) for device in owners],
        experts=[run.expert(device) for device in range(record.experts)],
        inputs=inputs,
        samples="held_out",
        labels=arrays.get("labels"),
        clients=arrays.get("clients"),
        input=InputSpec(record.data.dtype, record.data.shape, record.data.layout, resize, span),
        latent_dim=record.latent_dim,
        outputs=record.outputs,
        names=record.labels,
        inference=record.inference,
        answers_carry_prior=record.answers_carry_prior,
        extractor_source=_run_extractor(record),
        alike=True,
    )


def key_of(run: Run) -> str:
    """Source.key of a run, which is known before its networks are built: run.json names every other file's digest."""
    return sha256((run.folder / "run.json").read_bytes())


def of_modules(
    extractor: nn.Module,
    gate: nn.Module | Sequence[nn.Module],
    experts: Sequence[nn.Module],
    calibration: NDArray[Any],
    *,
    labels: NDArray[np.int64] | None = None,
    names: Sequence[str] | None = None,
    top_k: int = 1,
) -> Source:
    """The fleet of modules that nobody here has trained; calibration: inputs as the extractor takes them (n, …)."""
    gates, experts = list(gate) if isinstance(gate, Sequence) else [gate], list(experts)
    if not gates or not experts or not all(isinstance(net, nn.Module) for net in (extractor, *gates, *experts)):
        raise SourceError("extractor, gate and experts are torch modules, one of each at least")
    if not all(isinstance(array, np.ndarray) for array in (calibration, *([] if labels is None else [labels]))):
        raise SourceError("calibration and labels are numpy arrays")
    for module in (extractor, *gates, *experts):
        module.eval()
    if calibration.dtype.name not in ("uint8", "float32", "int64") or calibration.ndim < 2 or not len(calibration):
        raise SourceError(
            f"calibration is {calibration.dtype} {calibration.shape}; rows of uint8, float32 or int64 are due"
        )
    if labels is not None and (labels.shape != (len(calibration),) or labels.dtype != np.int64):
        raise SourceError(
            f"labels are {labels.dtype} {labels.shape}, not one int64 for each of {len(calibration)} samples"
        )
    if not np.isfinite(calibration).all():
        raise SourceError("calibration holds NaN or infinity")
    if names is not None and (
        not isinstance(names, Sequence) or not all(isinstance(name, str) and name.isprintable() for name in names)
    ):
        raise SourceError("names are text that can be printed")
    if not isinstance(top_k, int) or not 1 <= top_k <= len(experts):
        raise SourceError(f"top_k is {top_k}, not in 1..{len(experts)}, the experts")
    probe = torch.from_numpy(calibration[:PROBES].astype(calibration.dtype.newbyteorder("=")))
    latents = _tried(extractor, probe, "the extractor")
    scores = [_tried(net, latents, f"gate {i}") for i, net in enumerate(gates)]
    outputs = [_tried(net, latents, f"expert {i}") for i, net in enumerate(experts)]
    if any(s.shape[1] != len(experts) for s in scores) or len(gates) not in (1, len(experts)):
        raise SourceError(
            f"{counted(len(gates), 'gate')} with {counted(scores[0].shape[1], 'score')} cannot choose among"
            f" {counted(len(experts), 'expert')}"
        )
    if len({o.shape[1] for o in outputs}) != 1:
        raise SourceError(
            f"the experts put out {sorted({o.shape[1] for o in outputs})} numbers: all must put out as many"
        )
    if labels is not None and not 0 <= labels.min() <= labels.max() < outputs[0].shape[1]:
        raise SourceError(f"labels are not in 0..{outputs[0].shape[1] - 1}, the outputs")
    if names is not None and len(names) != outputs[0].shape[1]:
        raise SourceError(f"{counted(len(names), 'name')} for {counted(outputs[0].shape[1], 'output')}")
    image = calibration.ndim == 4 and calibration.shape[1] in (1, 3)
    span = (
        (0.0, 255.0) if calibration.dtype == np.uint8 else (float(calibration.min()), float(calibration.max()) + 1e-6)
    )
    return Source(
        key=_digest([extractor, *gates, *experts], [calibration, labels, latents, *scores, *outputs], names, top_k),
        extractor=extractor,
        gates=gates,
        experts=list(experts),
        inputs=calibration,
        samples="samples_given",
        labels=labels,
        clients=None,
        input=InputSpec(
            calibration.dtype.name,  # type: ignore[arg-type]  # looked at above
            calibration.shape[1:],
            "CHW" if image else "none",
            "stretch" if image else "exact",
            span,
        ),
        latent_dim=latents.shape[1],
        outputs=outputs[0].shape[1],
        names=tuple(names) if names is not None else None,
        inference=Inference(top_k, "outputs"),
        answers_carry_prior=True,
        extractor_source=_digest([extractor], [latents]),
        alike=False,
    )


def of_factory(path: str) -> Source:
    """What `package.module:factory` returns: a mapping of of_modules' arguments by name."""
    if ".py:" in path or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
        raise SourceError(
            f"--modules {path}: MODULE:FACTORY is due, such as theirs:fleet for fleet() in a theirs.py"
            " that lies in the current folder"
        )
    module = path.partition(":")[0]
    try:
        arguments = import_path(path)()
    except Exception as error:  # whatever somebody's module does
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise SourceError(f"{path}: no module {error.name} lies in the current folder, nor is installed") from error
        raise SourceError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(arguments, Mapping):
        raise SourceError(
            f"{path} must return a dict of extractor, gate, experts and calibration, not {type(arguments).__name__}"
        )
    try:
        inspect.signature(of_modules).bind(**arguments)
    except TypeError as error:
        raise SourceError(f"{path} returns no arguments of of_modules by name: {error}") from error
    return of_modules(**arguments)


def _tried(net: nn.Module, rows: torch.Tensor, name: str) -> torch.Tensor:
    try:
        with torch.no_grad():
            answer = net(rows)
    except Exception as error:  # whatever somebody's forward() does
        raise SourceError(f"{name} fails on rows of {list(rows.shape[1:])}: {' '.join(str(error).split())}") from error
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2 or answer.dtype != torch.float32:
        raise SourceError(f"{name} does not make float32 rows of numbers (n, …) of rows of {list(rows.shape[1:])}")
    return answer


def _digest(nets: Sequence[nn.Module], arrays: Sequence[Any], *facts: object) -> str:
    """Of modules, of what they answered (which attributes and code decide too), and of plain facts."""
    digest = hashlib.sha256(repr([str(net) for net in nets] + list(facts)).encode())
    states = [{"": array} for array in arrays if array is not None]
    for state in [net.state_dict() for net in nets] + states:
        for name, value in state.items():
            array = (
                value.detach().contiguous().numpy() if isinstance(value, torch.Tensor) else np.ascontiguousarray(value)
            )
            digest.update(repr((name, array.dtype.str, array.shape)).encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _run_extractor(record: RunRecord) -> str:
    """The extractor as it was trained: how it is built, and its weights."""
    net = record.networks.extractor
    weights = record.files["extractor.safetensors"].sha256
    return sha256(json.dumps([net.factory, dict(net.arguments), weights], sort_keys=True).encode())
