"""Measures what a stage of a training uses on this machine: seconds, peak memory, and energy where it is reported.

The figures are those of the whole process, and the energy is that of the whole CPU. Each is added up over
interruptions, because a checkpoint keeps it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")
POWERCAP = Path("/sys/class/powercap")

Usage = dict[str, dict[str, float]]
"""Stage -> `seconds`, `peak_memory_bytes`, and `energy_j` where the machine reports it."""


class StageMeter:
    """What one stage uses, from now on, added to what an earlier part of the same stage used."""

    def __init__(self, earlier: Usage, stage: str, proc: Path = PROC, powercap: Path = POWERCAP) -> None:
        self._earlier = earlier
        self._stage = stage
        self._proc = proc
        self._began = time.perf_counter()
        self._energy = _EnergyCounter(powercap)
        _reset_peak(proc)

    def usage(self) -> Usage:
        """The usage of every stage so far."""
        before = self._earlier.get(self._stage, {})
        now: dict[str, float] = {
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - self._began,
            "peak_memory_bytes": max(before.get("peak_memory_bytes", 0), _peak_bytes(self._proc)),
        }
        joules = self._energy.joules()
        if joules is not None:
            now["energy_j"] = before.get("energy_j", 0.0) + joules
        return {**self._earlier, self._stage: now}


def _reset_peak(proc: Path) -> None:
    """Start a new peak of the process's memory. Where this is not allowed, the peak counts from the process's start."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes(proc: Path) -> int:
    """The most memory the process held since the last reset (resident set size)."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _EnergyCounter:
    """Energy of the CPU packages since it was created (RAPL). Reading it usually needs root."""

    def __init__(self, powercap: Path) -> None:
        # The domain psys includes the packages, so it must not be added to them.
        domains = sorted(powercap.glob("intel-rapl:[0-9]"))
        self._packages = [path for path in domains if _text(path / "name").startswith("package")]
        self._last = {path: _number(path / "energy_uj") for path in self._packages}
        self._microjoules = 0

    def joules(self) -> float | None:
        """None where the machine does not report it. Call it every few minutes: a counter may wrap around once."""
        for path in self._packages:
            before = self._last[path]
            now = _number(path / "energy_uj")
            if before is None or now is None:
                return None
            wrapped = (_number(path / "max_energy_range_uj") or 0) if now < before else 0
            self._microjoules += now - before + wrapped
            self._last[path] = now
        return self._microjoules / 1e6 if self._packages else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def usage_of(metrics: Mapping[str, Any]) -> Usage:
    """The usage of every stage, from a run's metrics.json. Runs of nmoe 0.2 hold seconds alone."""
    measured = metrics.get("resources", {}).get("measured", {})
    seconds = metrics.get("seconds", {})
    return {stage: {"seconds": s, **measured.get(stage, {})} for stage, s in seconds.items() if stage != "all"}
