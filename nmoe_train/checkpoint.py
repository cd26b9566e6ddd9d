"""Where a training stands, in one file that is replaced whole after every round, and the folder that is claimed for it.

Weights and what must be known beside them lie in one safetensors file, so that neither can be newer than the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nmoe_edge.common.files import replace_file
from nmoe_train.errors import RunError
from nmoe_train.stages.federation import State

NAME, LOCK = "checkpoint.safetensors", "lock"
_FACTS = ("command", "config", "stage", "round", "history", "fingerprint", "seconds")
"""What stands beside the weights."""


def partial(out: Path) -> Path:
    """The folder beside `out` that a training keeps its checkpoint in."""
    out = Path(os.path.abspath(out))
    if not out.name or out.suffix == ".partial":
        raise RunError(f"{out}: no place for a run; choose another --out, and name the run without .partial")
    return out.with_name(out.name + ".partial")


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """The checkpoint's path for the training whose run will be `out`; no other process gets it meanwhile."""
    folder = partial(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}; choose another --out") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{out}: another process is training there; choose another --out") from error
        try:
            yield folder / NAME
        finally:
            if not (folder / NAME).exists():
                (folder / LOCK).unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()
    finally:
        os.close(lock)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state after `round` rounds of `stage`, which is in progress."""

    config: dict[str, Any]
    stage: str = "extractor"
    round: int = 0
    states: dict[str, Sequence[State]] = field(default_factory=dict)
    """By stage, one a client; where all clients share one, it is kept once."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry a round."""
    fingerprint: str = ""
    """Of the data that it was trained on."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, over all sittings."""
    command: str = "run"
    """That began it, and that goes on with it."""

    def write(self, path: Path) -> None:
        """Replace the file; RunError when the disk does not take it."""
        tensors, shared = {}, {}
        for stage, states in self.states.items():
            shared[stage] = len(states) if all(state is states[0] for state in states) else 0
            for i, state in enumerate(states[:1] if shared[stage] else states):
                tensors |= {f"{stage}/{i}/{key}": value.cpu().clone() for key, value in state.items()}
        facts = {name: getattr(self, name) for name in _FACTS} | {"shared": shared}
        try:
            replace_file(path, save(tensors, {"facts": json.dumps(facts), "digest": _digest(tensors, facts)}))
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}; the round before is kept") from error

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint in a file; RunError when there is none."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
                if file.metadata()["digest"] != _digest(tensors, facts):
                    raise ValueError("it is not what was written")
            shared = facts.pop("shared")
            if sorted(facts) != sorted(_FACTS):
                raise ValueError("it is of another version")
        except FileNotFoundError:
            raise RunError(f"{path.parent}: no training stopped there; leave --resume out to begin one") from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(f"{path}: no checkpoint to go on from: {reason}; remove its folder to begin anew") from error
        states: dict[str, Sequence[State]] = {}
        for stage, count in shared.items():
            parts: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                of, number, name = key.split("/", 2)
                if of == stage:
                    parts.setdefault(int(number), {})[name] = value
            states[stage] = [parts[0]] * count if count else [parts[i] for i in sorted(parts)]
        return cls(**facts, states=states)


def _digest(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> str:
    """sha256 of all weights, by name, and of what stands beside them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str | None:
    """The first setting in which two configurations differ, as a line; None when they are the same."""
    for key in sorted(old.keys() | new.keys()):
        a, b, place = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            deeper = difference(a, b, f"{place}.")
            if deeper:
                return deeper
        elif a != b:
            return f"{place} was {a!r} and is {b!r}"
    return None
