"""The checkpoint of a training, and the lock on the folder that holds it.

A checkpoint is one safetensors file, replaced as a whole after every round. Weights, history and configuration are in
the same file, so they always belong to the same round.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nmoe_edge.common.files import replace_file
from nmoe_train.errors import RunError
from nmoe_train.meter import Usage
from nmoe_train.stages.federation import State

CHECKPOINT_FILE = "checkpoint.safetensors"
LOCK_FILE = "lock"
_FACTS = ("command", "config", "stage", "round", "history", "fingerprint", "usage")
"""Fields stored as JSON in the file's metadata; `states` are its tensors."""


def partial_folder(out: Path) -> Path:
    """`<out>.partial`: the folder of the checkpoint while `out` is being trained.

    Raises RunError when `out` has no name or ends in .partial itself.
    """
    out = Path(os.path.abspath(out))
    if not out.name or out.suffix == ".partial":
        raise RunError(f"{out} cannot hold a run; choose another --out, and name the run without .partial")
    return out.with_name(out.name + ".partial")


@contextmanager
def claim_folder(out: Path) -> Iterator[Path]:
    """Lock `<out>.partial` for this process, and yield the path of its checkpoint.

    When the block ends and there is no checkpoint, the folder is removed unless it holds other files. Raises RunError
    when the folder cannot be made, or when another process has locked it.
    """
    folder = partial_folder(out)
    checkpoint = folder / CHECKPOINT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}; choose another --out") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{out}: another process is training there; wait for it, or choose another --out") from error
        try:
            yield checkpoint
        finally:
            if not checkpoint.exists():
                (folder / LOCK_FILE).unlink(missing_ok=True)
                (folder / "checkpoint.new").unlink(missing_ok=True)  # a write that was killed, by nmoe 0.1
                if not any(folder.iterdir()):
                    folder.rmdir()
    finally:
        os.close(lock)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training after `round` rounds of `stage`."""

    config: dict[str, Any]
    stage: str = "extractor"
    """The stage in progress."""
    round: int = 0
    """Number of finished rounds of that stage."""
    states: dict[str, Sequence[State]] = field(default_factory=dict)
    """Weights by stage, one state per client. A state that all clients share is written once."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished round."""
    fingerprint: str = ""
    """sha256 of the training data and its split."""
    usage: Usage = field(default_factory=dict)
    """Seconds, memory and energy by stage, over all interruptions."""
    command: str = "run"
    """The `nmoe-train` command that began this training; only the same command can resume it."""

    def write(self, path: Path) -> None:
        """Replace the file at `path`. Raises RunError when it cannot be written; the old file is then kept."""
        tensors: dict[str, torch.Tensor] = {}
        shared: dict[str, int] = {}
        for stage, states in self.states.items():
            all_shared = all(state is states[0] for state in states)
            shared[stage] = len(states) if all_shared else 0
            for i, state in enumerate(states[:1] if all_shared else states):
                tensors |= {f"{stage}/{i}/{key}": _copied(value) for key, value in state.items()}
        facts = {name: getattr(self, name) for name in _FACTS} | {"shared": shared}
        try:
            replace_file(path, save(tensors, {"facts": json.dumps(facts), "digest": _digest(tensors, facts)}))
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written: {error.strerror}; the checkpoint of the previous round is kept"
            ) from error

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a checkpoint. Raises RunError when the file is missing, damaged or from another version."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                if file.metadata()["digest"] != _digest(tensors, facts):
                    raise ValueError("its sha256 does not match its content")
            shared = facts.pop("shared")
            if "seconds" in facts:  # nmoe 0.2 stored nothing else of a stage's usage
                facts["usage"] = {stage: {"seconds": seconds} for stage, seconds in facts.pop("seconds").items()}
            if sorted(facts) != sorted(_FACTS):
                raise ValueError("another version of nmoe wrote it")
        except FileNotFoundError:
            raise RunError(
                f"{path.parent}: there is no stopped training to resume; omit --resume to start one"
            ) from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(f"{path}: cannot be resumed: {reason}; remove its folder to start again") from error
        states = {stage: _states(tensors, stage, count) for stage, count in shared.items()}
        return cls(**facts, states=states)


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU in the usual memory format, as safetensors requires."""
    return value.cpu().clone(memory_format=torch.contiguous_format)


def _states(tensors: Mapping[str, torch.Tensor], stage: str, shared_by: int) -> Sequence[State]:
    """The states of one stage from tensors named stage/client/key; shared_by: clients that share one state, or 0."""
    by_client: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        stage_of_tensor, client, key = name.split("/", 2)
        if stage_of_tensor == stage:
            by_client.setdefault(int(client), {})[key] = value
    if shared_by:
        return [by_client[0]] * shared_by
    return [by_client[i] for i in sorted(by_client)]


def _digest(tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> str:
    """sha256 of the metadata and of all tensors in the order of their names."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str | None:
    """The first setting that differs between two configurations, as text; None when they are equal.

    >>> difference({"gate": {"rate": 0.05}}, {"gate": {"rate": 0.1}})
    'gate.rate was 0.05 and is 0.1'
    """
    for key in sorted(old.keys() | new.keys()):
        name = f"{where}{key}"
        before = old.get(key)
        after = new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            nested = difference(before, after, f"{name}.")
            if nested:
                return nested
        elif before != after:
            return f"{name} was {before!r} and is {after!r}"
    return None
