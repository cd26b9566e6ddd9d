"""The run: the folder that training writes and export reads. RUN.md documents the format.

Weights are safetensors, arrays npz, everything else JSON; nothing is pickled. A run is written completely or not at
all. This module does not train: see pipeline.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save
from torch import nn

from nmoe_edge.common.files import replace_file
from nmoe_edge.common.folders import staged_folder
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_edge.protocol.familiar import Familiar
from nmoe_train.errors import RunError
from nmoe_train.nets import build
from nmoe_train.record import (
    SCHEMA,
    SCHEMAS,
    DataRecord,
    FileRecord,
    Inference,
    Networks,
    RunRecord,
    unknown_schema,
)
from nmoe_train.stages.calibration import Calibration, calibrated_net, calibration_arrays, no_calibration
from nmoe_train.stages.federation import State
from nmoe_train.stages.statistics import Statistics, as_arrays, from_arrays

__all__ = [
    "DataRecord",
    "FileRecord",
    "Inference",
    "Networks",
    "Run",
    "RunRecord",
    "read_run",
    "write_run",
    "write_unlisted",
]

RUN_FILE = "run.json"
CALIBRATION_FILE = "calibration.safetensors"
STATISTICS_FILE = "statistics.safetensors"
OTHER_FILES = ("calibration.npz", "metrics.json")
"""Required files that are neither run.json nor weights. read_run parses the last one."""

FILES = (
    r"run\.json|calibration\.npz|metrics\.json|baselines\.json|report\.html"
    r"|((gates|experts|heads|familiar)/\d+|extractor|gate|head|calibration|statistics)\.safetensors"
)
"""Regular expression for the paths that a run's folder may contain; a folder with any other file is not replaced."""


@dataclass(frozen=True)
class Run:
    """A run on disk. read_run has checked that every file has the size and sha256 that run.json lists.

    The methods build networks from their specification and load their weights; each call returns a new module in eval
    mode on the CPU. They raise NetError when a network cannot be built, and RunError when its weights do not fit.

    Example::

        run = read_run("runs/digits")
        latents = run.extractor()(images)            # uint8 (n, C, H, W) -> float32 (n, d)
        scores = run.gate(0)(latents)                # (n, experts)
        logits = run.expert(0)(latents)              # (n, classes)
        print(run.metrics["iid"]["networked"]["accuracy"])
    """

    folder: Path
    record: RunRecord
    """The content of run.json."""
    metrics: Mapping[str, Any]
    """The content of metrics.json. Accuracies are shares in 0..1, times are seconds."""

    def extractor(self) -> nn.Module:
        """The shared feature extractor: raw inputs (n, …) -> latents (n, d)."""
        return self._load("extractor", "extractor.safetensors")

    def gate(self, device: int) -> nn.Module:
        """The gate of device number `device`: latents (n, d) -> a score per expert (n, experts).

        Without personal gates, every device has the same one.
        """
        name = f"gates/{device:02}.safetensors" if self.record.personal_gates else "gate.safetensors"
        return self._load("gate", name)

    def expert(self, device: int) -> nn.Module:
        """The expert of device number `device` as it was trained: latents (n, d) -> outputs (n, K)."""
        return self._load("expert", f"experts/{device:02}.safetensors")

    def calibrated_expert(self, device: int) -> nn.Module:
        """The expert as devices run it, calibrated on held-out samples; the same as `expert` in a run of schema 1."""
        net = self.expert(device)
        found = self._calibrations()[0]
        if found is None or found.changes_nothing:
            return net
        return calibrated_net(net, float(found.scale[device]), found.bias[device])

    def calibrated_head(self, device: int) -> nn.Module | None:
        """`head`, calibrated on held-out samples where that helped; None when stage 1 trained no classifier."""
        net = self.head(device)
        found = self._calibrations()[1]
        if net is None or found is None or found.changes_nothing:
            return net
        return calibrated_net(net, float(found.scale[0]), found.bias[0])

    def familiar(self, device: int) -> Familiar | None:
        """What the client's latents look like, for the test of record.inference.familiar; None in a run without it."""
        name = f"familiar/{device:02}.safetensors"
        if name not in self.record.files:
            return None
        try:
            arrays = load_arrays(self.folder / name)
            found = Familiar(arrays["whitening"], arrays["centres"])
            if found.whitening.shape[0] != self.record.latent_dim:
                raise ValueError(f"whitening is for latents of {found.whitening.shape[0]} numbers")
            return found
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise RunError(f"{self.folder / name}: {_reason(error)}") from error

    def statistics(self) -> list[Statistics]:
        """What StatGate's clients published, one entry per device; empty in a run with another gate.

        `nmoe_train.stages.statgate.assemble` makes the gate from it, and from one entry more when a device joins.
        """
        if STATISTICS_FILE not in self.record.files:
            return []
        path = self.folder / STATISTICS_FILE
        try:
            return from_arrays(load_arrays(path), self.record.experts, self.record.latent_dim)
        except (OSError, ValueError, SafetensorError, RunError) as error:
            raise RunError(f"{path}: {_reason(error)}") from error

    def head(self, device: int) -> nn.Module | None:
        """The head of stage 1's classifier: latents (n, d) -> logits (n, K).

        It is the shared head, or the device's own when heads stayed with their clients. None when stage 1 trained no
        classifier.
        """
        if self.record.networks.head is None:
            return None
        shared = _HEAD in self.record.files
        return self._load("head", _HEAD if shared else _heads(self.record.experts)[device])

    def calibration(self) -> dict[str, np.ndarray]:
        """Held-out training samples: `inputs` (n, …) in the dtype and shape of record.data.

        `labels` (n,) and `clients` (n,) are int64, and present when they are known. Raises RunError when the file
        cannot be read or its arrays do not fit.
        """
        path = self.folder / "calibration.npz"
        data = self.record.data
        try:
            arrays = read_npz(path.read_bytes())
            inputs = arrays.get("inputs", np.zeros(0))
            if len(inputs) == 0 or (inputs.dtype.name, inputs.shape[1:]) != (data.dtype, data.shape):
                raise ValueError(f"holds no inputs of type {data.dtype} and shape {list(data.shape)}")
            for name in arrays.keys() & {"labels", "clients"}:
                if arrays[name].shape != (len(inputs),) or arrays[name].dtype != np.int64:
                    raise ValueError(f"{name} must hold one int64 per input")
            return arrays
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: {_reason(error)}") from error

    def _calibrations(self) -> tuple[Calibration | None, Calibration | None]:
        """Those of the experts and of stage 1's head."""
        if CALIBRATION_FILE not in self.record.files:
            return None, None
        path = self.folder / CALIBRATION_FILE
        try:
            arrays = load_arrays(path)
            experts = Calibration(arrays["scale"], arrays["bias"])
            head = Calibration(arrays["head_scale"], arrays["head_bias"]) if "head_scale" in arrays else None
            if experts.bias.shape != (self.record.experts, self.record.outputs):
                raise ValueError(f"it is for experts and classes {list(experts.bias.shape)}")
            if head is not None and head.bias.shape != (1, self.record.outputs):
                raise ValueError(f"it is for heads and classes {list(head.bias.shape)}")
            return experts, head
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise RunError(f"{path}: {_reason(error)}") from error

    def _load(self, role: str, name: str) -> nn.Module:
        net = build(getattr(self.record.networks, role))
        try:
            net.load_state_dict(load_file(self.folder / name))
        except (RuntimeError, SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{self.folder / name}: does not fit the {role} in {RUN_FILE}: {reason}") from error
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
    corrections: Calibration | None = None,
    head_correction: Calibration | None = None,
    familiar: Sequence[Familiar] = (),
    statistics: Sequence[Statistics] = (),
    report: str | None = None,
) -> Run:
    """Write a run to `folder` and return it.

    The files are written to a temporary folder, which then replaces `folder` in one step: a reader sees the new run or
    the old one, never a mixture.

    record: `versions` and `files` are filled in here
    experts: one state per device
    gates: one state per device when record.personal_gates, else a single shared state
    calibration: arrays as Run.calibration returns them
    metrics: must be JSON; NaN is refused
    heads: one state per device, a single shared state, or none
    corrections: the calibration of the experts; None: they stay as they are
    head_correction: the calibration of a shared head
    familiar: what each client's latents look like, one per device or none
    statistics: what StatGate's clients published, one per device or none
    report: HTML for report.html, if any

    Raises RunError when the states do not match `record`, when `folder` holds anything but a run, or when a file cannot
    be written. `folder` is then unchanged.
    """
    folder = Path(folder)
    names = [*_state_files(record), *_head_files(len(heads))]
    states = [extractor, *gates, *experts, *heads]
    if len(names) != len(states):
        raise RunError(
            f"{len(experts)} experts, {len(gates)} gates and {len(heads)} heads do not fit {record.experts} devices"
        )
    experts_as_trained = no_calibration(record.experts, record.outputs)
    calibrations = calibration_arrays(corrections or experts_as_trained, head_correction)
    arrays = {CALIBRATION_FILE: calibrations} if record.schema > 1 else {}
    arrays |= {name: _familiar_arrays(one) for name, one in zip(_familiar(len(familiar)), familiar, strict=True)}
    arrays |= {STATISTICS_FILE: as_arrays(statistics)} if statistics else {}
    try:
        with staged_folder(folder, RUN_FILE, FILES) as staging:
            for name, state in zip(names, states, strict=True):
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(save({key: tensor.clone() for key, tensor in state.items()}))
            for name, content in arrays.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(save_arrays(content))
            (staging / "calibration.npz").write_bytes(write_npz(calibration))
            (staging / "metrics.json").write_text(_json(metrics))
            if report is not None:
                (staging / "report.html").write_text(report, encoding="utf-8")
            files = {name: _file_record(staging / name) for name in [*names, *arrays, *OTHER_FILES]}
            complete = replace(record, versions=_versions(), files=files)
            (staging / RUN_FILE).write_text(_json(to_plain(complete)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder}: cannot be written: {_reason(error)}") from error
    return read_run(folder)


def read_run(folder: Path | str) -> Run:
    """Open a finished run and check every file against its size and sha256 in run.json.

    No network is built yet, so this runs no code from the run. Raises RunError, which names the file that is missing,
    damaged or malformed.

    Example::

        run = read_run("runs/digits")
        print(run.record.experts, "devices, seed", run.record.seed)
    """
    folder = Path(folder)
    if folder.name.endswith(".partial") and os.path.isdir(folder):
        raise RunError(f"{folder}: this training has not finished; finish it with --resume")
    if not os.path.isdir(folder):
        raise RunError(f"{folder}: no such run; expected a folder that nmoe-train wrote")
    path = folder / RUN_FILE
    if not path.exists() and (folder / "fleet.toml").exists():
        raise RunError(f"{folder}: a fleet of bundles, not a run; expected a folder that nmoe-train wrote")
    try:
        record = _parse_record(parse_json(_read_bytes(path)))
        for name in _listed_files(record):
            path = folder / name
            if record.files[name] != _file_record(path):
                raise ValueError(f"its size or sha256 differs from {RUN_FILE}; the file is damaged")
        metrics = parse_json(_read_bytes(path))  # the last file is metrics.json
        if not isinstance(metrics, dict):
            raise ValueError("not a JSON object")
        return Run(folder, record, metrics)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {_reason(error)}") from error


def write_unlisted(run: Run, name: str, text: str) -> None:
    """Write a file into the run's folder that run.json does not list: baselines.json or report.html.

    Raises RunError when it cannot be written.
    """
    try:
        replace_file(run.folder / name, text)
    except OSError as error:
        raise RunError(f"{run.folder / name}: cannot be written: {error.strerror}") from error


def _parse_record(plain: object) -> RunRecord:
    # The schema comes first: another schema has other keys, and "unknown key" would mislead.
    if isinstance(plain, dict) and plain.get("schema", SCHEMA) not in SCHEMAS:
        raise ValueError(unknown_schema(plain["schema"]))
    return from_plain(RunRecord, plain)


def _listed_files(record: RunRecord) -> list[str]:
    """Every file that run.json must list, metrics.json last. ValueError when it lists others."""
    calibration = [CALIBRATION_FILE] if record.schema > 1 else []
    required = [*_state_files(record), *calibration, *OTHER_FILES]
    optional = record.files.keys() - set(required)
    heads = {name for name in optional if name.startswith("head")}
    expected_heads: list[set[str]] = [set()]
    if record.networks.head is not None:
        expected_heads = [{_HEAD}, set(_heads(record.experts))]
    familiar = set(_familiar(record.experts)) if record.schema > 1 else set()
    expected_others = [familiar] if record.inference.familiar is not None else [set(), familiar]
    published = {STATISTICS_FILE} if record.networks.gate.factory == "statgate" else set()
    complete = len(record.files) == len(required) + len(optional)
    others = optional - heads - published
    if not complete or heads not in expected_heads or others not in expected_others or not published <= optional:
        raise ValueError(f"files are not those of a run with {record.experts} experts")
    return [*sorted(optional), *required]


def _read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("not a plain file")
    return path.read_bytes()


_HEAD = "head.safetensors"


def _heads(count: int) -> list[str]:
    return [f"heads/{i:02}.safetensors" for i in range(count)]


def _familiar(count: int) -> list[str]:
    return [f"familiar/{i:02}.safetensors" for i in range(count)]


def _familiar_arrays(one: Familiar) -> dict[str, np.ndarray]:
    return {"whitening": np.ascontiguousarray(one.whitening), "centres": np.ascontiguousarray(one.centres)}


def _head_files(count: int) -> list[str]:
    """Files for `count` heads; a single head is the shared one."""
    return _heads(count) if count > 1 else [_HEAD] * count


def _state_files(record: RunRecord) -> list[str]:
    """The files of extractor, gates and experts, in this order."""
    devices = range(record.experts)
    gates = [f"gates/{i:02}.safetensors" for i in devices] if record.personal_gates else ["gate.safetensors"]
    experts = [f"experts/{i:02}.safetensors" for i in devices]
    return ["extractor.safetensors", *gates, *experts]


def _file_record(path: Path) -> FileRecord:
    data = _read_bytes(path)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _versions() -> dict[str, str]:
    packages = ("nmoe", "torch", "numpy", "safetensors")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
