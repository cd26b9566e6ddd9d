"""Saves the rows from which a device estimates its class mix, so that they survive a restart.

A state that cannot be read or written is logged and costs no request.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.files import replace_file
from nmoe_edge.common.log import Log
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.errors import EdgeError
from nmoe_edge.protocol.classmix import ClassMix


def default_state() -> Path:
    """The user's state folder: nmoe in $XDG_STATE_HOME, by default in ~/.local/state."""
    configured = os.environ.get("XDG_STATE_HOME")
    parent = Path(configured) if configured else Path.home() / ".local" / "state"
    return parent / "nmoe"


def mix_path(state: Path, manifest: Manifest) -> Path:
    """The file for the class mix of this device with this trunk."""
    return state / f"{manifest.device}-{manifest.trunk[:12]}-mix.npz"


def save_mix(state: Path, manifest: Manifest, mix: ClassMix, log: Log) -> None:
    """Replace the saved class mix; an empty one is not saved. A reader sees the old file or the new one."""
    if not mix.rows:
        return
    path = mix_path(state, manifest)
    try:
        state.mkdir(parents=True, exist_ok=True)
        # The node's thread saves, so it must not wait for the disk. A damaged file is learned again.
        replace_file(path, write_npz({"rows": mix.saved_rows()}), durable=False)
    except OSError as error:
        log.rarely("class_mix_unsaved", f"{path}: cannot be written: {error.strerror}")


def load_mix(state: Path, manifest: Manifest, mix: ClassMix, log: Log) -> None:
    """Read the saved class mix, if there is one, into `mix`."""
    path = mix_path(state, manifest)
    try:
        mix.restore(read_npz(path.read_bytes())["rows"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError) as error:
        log("class_mix_unreadable", f"{path}: cannot be read, and is learned again: {error}")


def forget_mix(state: Path, device: str) -> None:
    """Delete the saved class mixes of one device, for every trunk. A device attic-2 is not affected by attic.

    EdgeError when one cannot be deleted, because the device would load it again.
    """
    name = re.compile(rf"{re.escape(device)}-[0-9a-f]{{12}}-mix\.npz")
    try:
        for path in [path for path in state.iterdir() if name.fullmatch(path.name)]:
            path.unlink(missing_ok=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise EdgeError(
            f"{error.filename or state}: the class mix cannot be forgotten: {error.strerror};"
            " make its folder readable and writable, or give another --state"
        ) from error
