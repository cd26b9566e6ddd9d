"""The fleet folder that an export finds at its output: what is still valid there, and what the new one keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.manifest import Manifest, sha256
from nmoe_edge.errors import EdgeError

REPORT = "report.json"


class Existing:
    """A fleet folder as it is before an export. The folder may be missing, incomplete or damaged."""

    def __init__(self, folder: Path) -> None:
        self.fleet = read_fleet(folder / FLEET_FILE) if (folder / FLEET_FILE).exists() else None
        self.devices = {device.name: device for device in self.fleet.device} if self.fleet else {}
        """An export keeps the addresses and keys of these devices."""
        self.report: dict[str, Any] = {}
        """Empty when it cannot be read; the export is then done again."""
        with suppress(OSError, ValueError):
            report = json.loads((folder / REPORT).read_bytes())
            self.report = report if isinstance(report, dict) else {}
        self.folder = folder
        self._known: dict[str, Path] = {}

    def intact(self, wanted: Collection[int]) -> bool:
        """Whether the bundles of the wanted devices, and any others in the folder, are those that fleet.toml names."""
        for device in self.devices.values():
            expected = device.expert in wanted or os.path.lexists(self.folder / device.name)
            if expected and not self.has_bundle(device.name, device.bundle):
                return False
        return True

    def has_bundle(self, name: str, digest: str) -> bool:
        """Whether the folder has a valid bundle with this name and digest."""
        try:
            return read_bundle(self.folder / name).manifest.digest == digest
        except EdgeError:
            return False

    def link(self, bundle: Path, manifest: Manifest) -> None:
        """Hard-link the files of a new bundle to equal files of the old one, or of other new bundles.

        A file system without hard links keeps copies.
        """
        for name, entry in manifest.files.items():
            path = bundle / name
            twin = self._known.setdefault(entry.sha256, path)
            old = self.folder / bundle.name / name
            if twin is path and _is_like(old, path) and sha256(old.read_bytes()) == entry.sha256:
                twin = old
            if twin is not path:
                staged = path.with_name(f"{name}.link")
                with suppress(OSError):
                    os.link(twin, staged)
                    staged.replace(path)


def _is_like(old: Path, new: Path) -> bool:
    """Whether `old` is a regular file with the mode of `new`."""
    return old.is_file() and not old.is_symlink() and old.stat().st_mode == new.stat().st_mode
