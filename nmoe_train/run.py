"""A run: the folder that training writes and export reads. RUN.md says the same to people.

Weights are safetensors, arrays npz, everything else JSON: reading a run never unpickles. It is written as a whole or
not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from nmoe_edge.common.files import replace_file
from nmoe_edge.common.folders import staged_folder
from nmoe_edge.common.limits import MAX_EXPERTS
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_train.errors import RunError
from nmoe_train.nets import NetSpec, build
from nmoe_train.stages.federation import State

SCHEMA = 1
RUN_FILE = "run.json"
OTHER_FILES = ("calibration.npz", "metrics.json")
"""What a run holds beside run.json and weights; metrics.json is the last."""

FILES = (
    r"run\.json|calibration\.npz|metrics\.json|baselines\.json|report\.html"
    r"|((gates|experts|heads)/\d+|extractor|gate|head)\.safetensors"
)
"""What a run's folder may hold, as a regular expression."""


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What was trained on."""

    name: str
    fingerprint: str
    """sha256 of the samples and of who had which."""
    samples: int
    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int, ...]
    """Of one sample."""
    layout: Literal["CHW", "HWC", "none"]

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.shape or min(self.shape) < 1:
            raise ValueError(f"{self.samples} samples of shape {list(self.shape)} are none")
        if not self.name.isprintable():
            raise ValueError("the name of the data cannot be printed")


@dataclass(frozen=True, slots=True)
class Networks:
    """How the networks are rebuilt."""

    extractor: NetSpec
    gate: NetSpec
    expert: NetSpec
    head: NetSpec | None = None
    """Of the classifier that stage 1 trained, where it was one."""


@dataclass(frozen=True, slots=True)
class Inference:
    """What a device is to do with them."""

    top_k: int
    combination: Literal["outputs", "probabilities"]
    """What is summed: the experts' outputs, or the softmax of each."""
    local_first: float | None = None
    """A row whose own expert is surer than this, which held-out training data chose, is answered at home."""
    adapt: bool = False
    """Whether a device estimates its own class mix and multiplies it in."""

    def __post_init__(self) -> None:
        if self.local_first is not None and not 0 <= self.local_first <= 1:
            raise ValueError(f"local_first is {self.local_first}, not in 0..1")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the run."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """run.json."""

    schema: int
    config: Mapping[str, Any]
    """Every setting of the training, resolved: what a default was is written out."""
    seed: int
    data: DataRecord
    networks: Networks
    latent_dim: int
    experts: int
    outputs: int
    personal_gates: bool
    """Whether each device has a gate of its own, in gates/NN.safetensors."""
    answers_carry_prior: bool
    """Whether an expert leans to its own client's classes; false when it was trained with logit adjustment."""
    inference: Inference
    labels: tuple[str, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python and of the packages that shape the numbers; written by write_run."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """By path in the folder, run.json apart; written by write_run."""

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is unknown: this nmoe reads schema {SCHEMA}")
        if min(self.latent_dim, self.outputs) < 1 or not 1 <= self.experts <= MAX_EXPERTS:
            raise ValueError(f"latent_dim and outputs are at least 1, experts 1 to {MAX_EXPERTS}")
        if self.inference.adapt and self.answers_carry_prior:
            raise ValueError("adapt needs answers that carry no prior")
        if not 1 <= self.inference.top_k <= self.experts:
            raise ValueError(f"top_k is {self.inference.top_k} of {self.experts} experts")
        if self.labels is not None and len(self.labels) != self.outputs:
            raise ValueError(f"{len(self.labels)} labels for {self.outputs} outputs")
        if self.labels is not None and not all(label.isprintable() for label in self.labels):
            raise ValueError("a label that cannot be printed")


@dataclass(frozen=True)
class Run:
    """A run on disk whose every file is as run.json says."""

    folder: Path
    record: RunRecord
    metrics: Mapping[str, Any]

    def extractor(self) -> nn.Module:
        """The shared feature extractor."""
        return self._load("extractor", "extractor.safetensors")

    def gate(self, device: int) -> nn.Module:
        """The gate of a device: its own, or everybody's."""
        return self._load(
            "gate", f"gates/{device:02}.safetensors" if self.record.personal_gates else "gate.safetensors"
        )

    def expert(self, device: int) -> nn.Module:
        """The personal expert of a device."""
        return self._load("expert", f"experts/{device:02}.safetensors")

    def head(self, device: int) -> nn.Module | None:
        """The head of stage 1's classifier: everybody's, or the device's own; None where stage 1 had no classifier."""
        if self.record.networks.head is None:
            return None
        return self._load("head", _HEAD if _HEAD in self.record.files else _heads(self.record.experts)[device])

    def calibration(self) -> dict[str, np.ndarray]:
        """Held-out training samples: `inputs` (n, …), and `labels` (n,) and `clients` (n,) where they are known."""
        path, data = self.folder / "calibration.npz", self.record.data
        try:
            arrays = read_npz(path.read_bytes())
            inputs = arrays.get("inputs", np.zeros(0))
            if len(inputs) == 0 or (inputs.dtype.name, inputs.shape[1:]) != (data.dtype, data.shape):
                raise ValueError(f"holds no inputs that are {data.dtype} {list(data.shape)}")
            for name in arrays.keys() & {"labels", "clients"}:
                if arrays[name].shape != (len(inputs),) or arrays[name].dtype != np.int64:
                    raise ValueError(f"{name} are not one whole number an input")
            return arrays
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: {_reason(error)}") from error

    def _load(self, role: str, name: str) -> nn.Module:
        net = build(getattr(self.record.networks, role))
        try:
            net.load_state_dict(load_file(self.folder / name))
        except (RuntimeError, SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{self.folder / name}: does not fit the {role} of {RUN_FILE}: {reason}") from error
        return net


def write_run(
    folder: Path | str,
    record: RunRecord,
    *,
    extractor: State,
    experts: Sequence[State],
    gates: Sequence[State],
    calibration: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    heads: Sequence[State] = (),
    report: str | None = None,
) -> Run:
    """Write a run as a whole: a reader sees it, the one before it, or none.

    `gates` are one a device when they are personal, else the one that all share; so are `heads`, where there are any.
    """
    folder = Path(folder)
    names = [*_state_files(record), *(_heads(len(heads)) if len(heads) > 1 else [_HEAD] * len(heads))]
    states = [extractor, *gates, *experts, *heads]
    if len(names) != len(states):
        raise RunError(f"{len(experts)} experts and {len(gates)} gates are not those of {record.experts} devices")
    try:
        with staged_folder(folder, RUN_FILE, FILES) as staging:
            for name, state in zip(names, states, strict=True):
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(save({key: tensor.clone() for key, tensor in state.items()}))
            (staging / "calibration.npz").write_bytes(write_npz(calibration))
            (staging / "metrics.json").write_text(_json(metrics))
            if report is not None:
                (staging / "report.html").write_text(report, encoding="utf-8")
            files = {name: _describe(staging / name) for name in [*names, *OTHER_FILES]}
            written = replace(record, versions=_versions(), files=files)
            (staging / RUN_FILE).write_text(_json(to_plain(written)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder}: cannot be written: {_reason(error)}") from error
    return read_run(folder)


def read_run(folder: Path | str) -> Run:
    """Open a run; RunError says which of its files is not as it should be."""
    folder = Path(folder)
    path = folder / RUN_FILE
    if not os.path.isdir(folder) or folder.name.endswith(".partial"):
        what = "a training that stopped, not a run" if os.path.isdir(folder) else "no such run"
        raise RunError(f"{folder}: {what}")
    try:
        plain = parse_json(_read_bytes(path))
        if isinstance(plain, dict) and plain.get("schema", SCHEMA) != SCHEMA:
            # Before its keys are looked at: another schema has others.
            raise ValueError(f"schema {plain['schema']!r:.40} is unknown: this nmoe reads schema {SCHEMA}")
        record = from_plain(RunRecord, plain)
        needed = [*_state_files(record), *OTHER_FILES]
        heads = record.files.keys() - set(needed)
        due = [{_HEAD}, set(_heads(record.experts))] if record.networks.head else [set()]
        if len(record.files) != len(needed) + len(heads) or heads not in due:
            raise ValueError(f"files are not those of a run with {record.experts} experts")
        names = [*sorted(heads), *needed]
        for name in names:
            path = folder / name
            if record.files[name] != _describe(path):
                raise ValueError(f"not the file that {RUN_FILE} describes: its size or sha256 differs")
        metrics = parse_json(_read_bytes(path))
        if not isinstance(metrics, dict):
            raise ValueError("not a JSON object")
        return Run(folder, record, metrics)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {_reason(error)}") from error


def write_beside(run: Run, name: str, text: str) -> None:
    """Write a file that is made from a run, and that run.json does not describe: baselines.json, report.html."""
    try:
        replace_file(run.folder / name, text)
    except OSError as error:
        raise RunError(f"{run.folder / name}: cannot be written: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("not a plain file")
    return path.read_bytes()


_HEAD = "head.safetensors"


def _heads(count: int) -> list[str]:
    return [f"heads/{i:02}.safetensors" for i in range(count)]


def _state_files(record: RunRecord) -> list[str]:
    """Extractor, gates, experts: every file of weights."""
    devices = range(record.experts)
    gates = [f"gates/{i:02}.safetensors" for i in devices] if record.personal_gates else ["gate.safetensors"]
    return ["extractor.safetensors", *gates, *(f"experts/{i:02}.safetensors" for i in devices)]


def _describe(path: Path) -> FileRecord:
    data = _read_bytes(path)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _versions() -> dict[str, str]:
    packages = ("nmoe", "torch", "numpy", "safetensors")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
