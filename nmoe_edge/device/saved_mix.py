"""What a device has learnt, kept across its restarts: the rows that its class mix is estimated from."""

from __future__ import annotations

import os
from pathlib import Path

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.files import replace_file
from nmoe_edge.common.log import Log
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.protocol.classmix import ClassMix


def default_state() -> Path:
    """Where state is kept when nobody says."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "nmoe"


def mix_path(state: Path, manifest: Manifest) -> Path:
    """Where the class mix of this device and this trunk is kept."""
    return state / f"{manifest.device}-{manifest.trunk[:12]}-mix.npz"


def keep_mix(state: Path, manifest: Manifest, mix: ClassMix, log: Log) -> None:
    """Write it: a reader sees the old file or the new one."""
    if not mix.rows:
        return
    path = mix_path(state, manifest)
    try:
        state.mkdir(parents=True, exist_ok=True)
        replace_file(path, write_npz({"rows": mix.remembered()}))
    except OSError as error:  # the device serves all the same
        log.rarely("class mix", f"{path}: not kept: {error.strerror}")


def kept_mix(state: Path, manifest: Manifest, mix: ClassMix, log: Log) -> None:
    """Take up what was kept, if anything."""
    path = mix_path(state, manifest)
    try:
        mix.recall(read_npz(path.read_bytes())["rows"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError) as error:
        log("class mix", f"{path}: cannot be read, and is learnt anew: {error}")


def forget_mix(state: Path, device: str) -> None:
    """Remove what was kept of a device; of attic, not of attic-2."""
    for path in state.glob(f"{device}-{'[0-9a-f]' * 12}-mix.npz"):
        path.unlink()
