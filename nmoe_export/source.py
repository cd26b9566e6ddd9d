"""What an export starts from: a training run, or your own modules with samples of what they receive."""

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
from nmoe_edge.protocol.answering import AnswerRules
from nmoe_edge.protocol.familiar import Familiar
from nmoe_export.errors import SourceError
from nmoe_train.run import Run, RunRecord

_PROBES = 32
"""Samples that modules are tried with."""
_INPUT_TYPES = ("uint8", "float32", "int64")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The networks of a fleet, the samples that calibrate and measure them, and the rules of answering.

    Made by `of_run` or `of_modules`.
    """

    key: str
    """A digest of everything in the source: equal keys mean equal sources."""
    extractor: nn.Module
    gates: Sequence[nn.Module]
    """One gate that all devices share, or one for each device."""
    experts: Sequence[nn.Module]
    """One for each device."""
    inputs: NDArray[Any]
    """Samples (n, …). Half of them calibrate, the other half measures."""
    samples: Literal["held_out", "samples_given"]
    """The name of the samples in a manifest: a run's are known to be held out from training, other samples are not."""
    labels: NDArray[np.int64] | None
    """(n,)"""
    clients: NDArray[np.int64] | None
    """(n,), the client each sample belongs to; None when unknown"""
    input: InputSpec
    latent_dim: int
    outputs: int
    names: tuple[str, ...] | None
    """The name of each output."""
    inference: AnswerRules
    answers_carry_prior: bool
    extractor_source: str
    """A digest of the extractor as it was trained."""
    alike: bool
    """Whether all gates are built alike, and all experts, so that one exported graph serves every module of a kind."""
    familiar: Sequence[Familiar] | None = None
    """For each device the statistics of its latents; needed where `inference` tests whether a latent is familiar."""

    @property
    def calibration_rows(self) -> NDArray[np.int64]:
        """The numbers of the samples that calibrate graphs and choose thresholds."""
        return np.flatnonzero(self._halves() == 1)

    @property
    def measured_rows(self) -> NDArray[np.int64]:
        """The numbers of the other samples. All reported accuracies come from these alone."""
        return np.flatnonzero(self._halves() == 0)

    def _halves(self) -> NDArray[np.int64]:
        """0 for the measured samples and 1 for the others, (n,). Every second sample of each client is a 1."""
        halves = np.arange(len(self.inputs)) % 2
        if self.clients is not None:
            for client in np.unique(self.clients):
                rows = np.flatnonzero(self.clients == client)
                halves[rows] = np.arange(len(rows)) % 2
        return halves


def of_run(run: Run) -> Source:
    """The fleet of a training run."""
    record = run.record
    arrays = run.calibration()
    inputs = arrays["inputs"]
    resize: Literal["exact", "stretch"] = "exact" if record.data.layout == "none" else "stretch"
    gate_owners = range(record.experts if record.personal_gates else 1)
    return Source(
        key=key_of(run),
        extractor=run.extractor(),
        gates=[run.gate(device) for device in gate_owners],
        experts=[run.calibrated_expert(device) for device in range(record.experts)],
        inputs=inputs,
        samples="held_out",
        labels=arrays.get("labels"),
        clients=arrays.get("clients"),
        input=InputSpec(record.data.dtype, record.data.shape, record.data.layout, resize, _span(inputs)),
        latent_dim=record.latent_dim,
        outputs=record.outputs,
        names=record.labels,
        inference=record.inference.answer_rules(),
        answers_carry_prior=record.answers_carry_prior,
        extractor_source=_run_extractor(record),
        alike=True,
        familiar=_familiar(run),
    )


def _familiar(run: Run) -> list[Familiar] | None:
    """For each device what is familiar to it; None where the run does not test that."""
    if run.record.inference.familiar is None:
        return None
    statistics = [run.familiar(device) for device in range(run.record.experts)]
    known = [familiar for familiar in statistics if familiar is not None]
    if len(known) < len(statistics):
        raise SourceError(
            f"{run.folder}: inference.familiar is set, but the run has no statistics of familiar latents;"
            " repeat its training"
        )
    return known


def key_of(run: Run) -> str:
    """`Source.key` of a run, without building its networks: run.json holds the digest of every other file."""
    path = run.folder / "run.json"
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


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
    """A source made of your own torch modules.

    Arguments:
        extractor: returns latents, float32 (n, d).
        gate: takes latents and returns scores, float32 (n, experts): one module, or one for each device.
        experts: one module for each device. Each takes latents and returns outputs, float32 (n, k).
        calibration: samples as the extractor takes them, (n, …) of uint8, float32 or int64. Half of them calibrate
            int8, the other half measures. int8 needs at least 64 with the default recipe.
        labels: the class of each sample, int64 (n,). Without them accuracy is agreement with the float modules.
        names: the name of each output.
        top_k: how many experts answer a row.

    Raises SourceError when the modules and samples do not fit together. The modules are put in evaluation mode.

    Example:
        source = of_modules(extractor, gate, [first, second], images, labels=labels)
        export_fleet(source, "bundles/mine")
    """
    gates = list(gate) if isinstance(gate, Sequence) else [gate]
    experts = list(experts)
    _check_types(extractor, gates, experts, calibration, labels)
    for module in (extractor, *gates, *experts):
        module.eval()
    _check_samples(calibration, labels)
    _check_rules(names, top_k, len(experts))

    native = calibration.dtype.newbyteorder("=")  # torch takes no other
    probe = torch.from_numpy(calibration[:_PROBES].astype(native))
    latents = _run_module(extractor, probe, "the extractor")
    scores = [_run_module(net, latents, f"gate {i}") for i, net in enumerate(gates)]
    outputs = [_run_module(net, latents, f"expert {i}") for i, net in enumerate(experts)]
    _check_widths(scores, outputs)
    width = outputs[0].shape[1]
    if labels is not None and not 0 <= labels.min() <= labels.max() < width:
        raise SourceError(f"labels are {labels.min()}..{labels.max()}; expected 0..{width - 1}, the outputs")
    if names is not None and len(names) != width:
        raise SourceError(f"{counted(len(names), 'name')} for {counted(width, 'output')}; give one for each")

    is_image = calibration.ndim == 4 and calibration.shape[1] in (1, 3)
    input_spec = InputSpec(
        calibration.dtype.name,  # type: ignore[arg-type]  # one of _INPUT_TYPES
        calibration.shape[1:],
        "CHW" if is_image else "none",
        "stretch" if is_image else "exact",
        _span(calibration),
    )
    return Source(
        key=_digest([extractor, *gates, *experts], [calibration, labels, latents, *scores, *outputs], names, top_k),
        extractor=extractor,
        gates=gates,
        experts=experts,
        inputs=calibration,
        samples="samples_given",
        labels=labels,
        clients=None,
        input=input_spec,
        latent_dim=latents.shape[1],
        outputs=width,
        names=tuple(names) if names is not None else None,
        inference=AnswerRules(top_k, "outputs"),
        answers_carry_prior=True,
        extractor_source=_digest([extractor], [latents]),
        alike=False,
    )


def of_factory(path: str) -> Source:
    """The source that the function `package.module:factory` describes.

    The function returns the arguments of `of_modules` as a dict. Raises SourceError when it cannot be imported, when it
    raises, or when its arguments do not fit.
    """
    if ".py:" in path or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
        raise SourceError(
            f"--modules {path}: expected MODULE:FACTORY, such as theirs:fleet for the function fleet() in theirs.py in"
            " the current folder"
        )
    module = path.partition(":")[0]
    try:
        arguments = import_path(path)()
    except Exception as error:  # the user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise SourceError(
                f"--modules {path}: there is no module {error.name} in the current folder, and none is installed"
            ) from error
        raise SourceError(f"--modules {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(arguments, Mapping):
        raise SourceError(
            f"--modules {path} must return a dict of extractor, gate, experts and calibration;"
            f" it returned {type(arguments).__name__}"
        )
    try:
        inspect.signature(of_modules).bind(**arguments)
    except TypeError as error:
        raise SourceError(
            f"--modules {path} must return a dict of extractor, gate, experts and calibration, and if you like labels,"
            f" names and top_k: {error}"
        ) from error
    return of_modules(**arguments)


def _check_types(extractor: object, gates: list[Any], experts: list[Any], calibration: object, labels: object) -> None:
    modules = (extractor, *gates, *experts)
    if not gates or not experts or not all(isinstance(module, nn.Module) for module in modules):
        raise SourceError("extractor, gate and experts must be torch modules, at least one of each")
    if not isinstance(calibration, np.ndarray) or not isinstance(labels, np.ndarray | None):
        raise SourceError("calibration and labels must be numpy arrays")


def _check_samples(calibration: NDArray[Any], labels: NDArray[Any] | None) -> None:
    if calibration.dtype.name not in _INPUT_TYPES or calibration.ndim < 2 or not len(calibration):
        raise SourceError(
            f"calibration is {calibration.dtype} {calibration.shape}; expected rows (n, …) of uint8, float32 or int64"
        )
    if labels is not None and (labels.shape != (len(calibration),) or labels.dtype != np.int64):
        raise SourceError(
            f"labels are {labels.dtype} {labels.shape}; expected int64 ({len(calibration)},), one for each sample"
        )
    if not np.isfinite(calibration).all():
        raise SourceError("calibration contains NaN or infinity")


def _check_rules(names: object, top_k: object, experts: int) -> None:
    if names is not None:
        is_text = isinstance(names, Sequence) and all(isinstance(name, str) and name.isprintable() for name in names)
        if not is_text:
            raise SourceError("names must be a list of printable text")
    if not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise SourceError(f"top_k is {top_k}; expected 1..{experts}, the number of experts")


def _check_widths(scores: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """`scores` holds what each gate returned, `outputs` what each expert returned."""
    experts = len(outputs)
    fits_experts = all(gate.shape[1] == experts for gate in scores)
    if not fits_experts or len(scores) not in (1, experts):
        raise SourceError(
            f"{counted(len(scores), 'gate')} with {counted(scores[0].shape[1], 'score')} cannot choose among"
            f" {counted(experts, 'expert')}; expected one gate, or one for each expert, with a score for"
            " each expert"
        )
    widths = sorted({expert.shape[1] for expert in outputs})
    if len(widths) != 1:
        raise SourceError(f"the experts return {widths} numbers a row; all must return the same number")


def _run_module(net: nn.Module, rows: torch.Tensor, name: str) -> torch.Tensor:
    """What a module returns for `rows`. Raises SourceError unless that is float32 (n, numbers)."""
    shape = list(rows.shape[1:])
    try:
        with torch.no_grad():
            answer = net(rows)
    except Exception as error:  # the user's forward() may raise anything
        raise SourceError(f"{name} fails on rows of {shape}: {' '.join(str(error).split())}") from error
    if not isinstance(answer, torch.Tensor):
        raise SourceError(f"{name} returned {type(answer).__name__}; it must return a float32 tensor")
    if answer.ndim != 2:
        returned = ", ".join(["n", *map(str, answer.shape[1:])])
        raise SourceError(f"{name} returned ({returned}); it must return (n, d). Flatten it: x.flatten(1)")
    if answer.dtype != torch.float32:
        raise SourceError(f"{name} returned {str(answer.dtype).removeprefix('torch.')}; it must return float32")
    return answer


def _span(inputs: NDArray[Any]) -> tuple[float, float]:
    """The range of values that inputs may have."""
    if inputs.dtype == np.uint8:
        return 0.0, 255.0
    return float(inputs.min()), float(inputs.max()) + 1e-6


def _digest(nets: Sequence[nn.Module], arrays: Sequence[Any], *facts: object) -> str:
    """A digest of modules, arrays and plain facts.

    `arrays` include what the modules answered, because their code and attributes decide that too.
    """
    digest = hashlib.sha256(repr([str(net) for net in nets] + list(facts)).encode())
    states = [net.state_dict() for net in nets]
    states += [{"": array} for array in arrays if array is not None]
    for state in states:
        for name, value in state.items():
            is_tensor = isinstance(value, torch.Tensor)
            array = value.detach().contiguous().numpy() if is_tensor else np.ascontiguousarray(value)
            digest.update(repr((name, array.dtype.str, array.shape)).encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _run_extractor(record: RunRecord) -> str:
    """A digest of the extractor as it was trained: how it is built, and its weights."""
    net = record.networks.extractor
    weights = record.files["extractor.safetensors"].sha256
    return sha256(json.dumps([net.factory, dict(net.arguments), weights], sort_keys=True).encode())
