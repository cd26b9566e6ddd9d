"""What the board says of itself: who it is, how it is at this moment, what a process takes, what power it draws.

Everything is read of /proc and /sys under a root that is an argument. What a board does not tell is None and no guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path("/")
_ARM_CORES = {
    ("0x41", "0xd03"): "Arm Cortex-A53",
    ("0x41", "0xd04"): "Arm Cortex-A35",
    ("0x41", "0xd05"): "Arm Cortex-A55",
    ("0x41", "0xd07"): "Arm Cortex-A57",
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd42"): "Arm Cortex-A78AE",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}
"""Implementer and part of /proc/cpuinfo, where the kernel has no name: what Raspberry Pis and Jetsons have."""
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Pi's get_throttled; 16 to 19 the same since it was booted."""
_SINCE_BOOT = 16
_TICK_NS = 200_000_000
_RAIL = re.compile(r"VDD_IN|POM_5V_IN|VIN_SYS_5V0|VDD_5V_IN", re.I)
"""A Jetson's whole input, whatever the model calls it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while it runs."""

    board: str | None
    cpu: str | None
    cores: int | None
    memory_bytes: int | None
    kernel: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """What may."""

    load: float | None
    """Of the last minute."""
    governor: str | None
    mhz: float | None
    """Of the fastest core."""
    most_mhz: float | None
    temperature_c: float | None
    """Of the hottest zone."""
    throttled: str | None
    power: str | None
    """Where the power comes from."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of this process, in bytes."""

    rss: int | None
    pss: int | None
    """What it shares with others counts in part."""
    peak: int | None


def read_machine(root: Path = ROOT) -> Machine:
    """Who it is."""
    info = _text(root / "proc/cpuinfo") or ""
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    arm = (named.get("CPU implementer", ""), named.get("CPU part", ""))
    unnamed = f"implementer {arm[0]}, part {arm[1]}" if all(arm) else None
    return Machine(
        board=_text(root / "proc/device-tree/model") or _text(root / "sys/devices/virtual/dmi/id/product_name"),
        cpu=named.get("model name") or _ARM_CORES.get(arm) or unnamed,
        cores=len(re.findall(r"^processor\s*:", info, re.M)) or None,
        memory_bytes=_kilobytes(_text(root / "proc/meminfo"), "MemTotal"),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
    )


def read_moment(root: Path = ROOT) -> Moment:
    """How it is."""
    cpus = root / "sys/devices/system/cpu"
    governors = sorted({text for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor") if (text := _text(path))})
    zones = _numbers(root / "sys/class/thermal", "thermal_zone*/temp")
    return Moment(
        load=_maybe(float, (_text(root / "proc/loadavg") or "").partition(" ")[0]),
        governor=", ".join(governors) or None,
        mhz=_scaled(_numbers(cpus, "cpu[0-9]*/cpufreq/scaling_cur_freq"), 1000),
        most_mhz=_scaled(_numbers(cpus, "cpu[0-9]*/cpufreq/cpuinfo_max_freq"), 1000),
        temperature_c=_scaled(zones, 1000),
        throttled=_throttled(root),
        power=_power_source(root / "sys/class/power_supply"),
    )


def read_memory(root: Path = ROOT) -> Memory:
    """What this process takes."""
    exact, status = _text(root / "proc/self/smaps_rollup"), _text(root / "proc/self/status")
    rss = _kilobytes(exact, "Rss")
    return Memory(
        rss=rss if rss is not None else _kilobytes(status, "VmRSS"),
        pss=_kilobytes(exact, "Pss"),
        peak=_kilobytes(status, "VmHWM"),
    )


class Meter:
    """Power from when it was made to its last `tick`: RAPL's counters, or the power of a Jetson's input summed up."""

    def __init__(self, now_ns: int, root: Path = ROOT) -> None:
        """Find what there is to be read."""
        domains = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
        packages = [path for path in domains if (_text(path / "name") or "").startswith("package")]  # psys has them too
        self._counters = {path: _number(path / "energy_uj") for path in packages}
        labels = root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")
        self._rails = [path for path in labels if _RAIL.search(_text(path) or "")][:1]
        self._began_ns = self._last_ns = now_ns
        self._joules = 0.0
        self._watts = self._rail_w()

    def tick(self, now_ns: int) -> None:
        """Read again, where the last time is long enough ago; a minute is too long: counters begin anew when full."""
        if now_ns - self._last_ns < _TICK_NS:
            return
        for path, before in self._counters.items():
            now, full = _number(path / "energy_uj"), _number(path / "max_energy_range_uj")
            if before is not None and now is not None:
                self._joules += (now - before if now >= before else now - before + (full or 0)) / 1e6
            self._counters[path] = now
        watts = self._rail_w()
        if self._watts is not None and watts is not None:
            self._joules += (self._watts + watts) / 2 * (now_ns - self._last_ns) / 1e9
        self._watts, self._last_ns = watts, now_ns

    @property
    def mean_w(self) -> float | None:
        """Mean power; None where the board does not tell."""
        told = self._watts is not None or (self._counters and None not in self._counters.values())
        took_s = (self._last_ns - self._began_ns) / 1e9
        return self._joules / took_s if told and took_s > 0 else None

    def _rail_w(self) -> float | None:
        for label in self._rails:
            number = re.sub(r"\D", "", label.name)
            millivolts, milliamperes = (_number(label.parent / f"{what}{number}_input") for what in ("in", "curr"))
            if millivolts is not None and milliamperes is not None:
                return millivolts * milliamperes / 1e6
        return None


def _throttled(root: Path) -> str | None:
    """A Pi's own word, or how often an Intel core was slowed down by its heat."""
    for path in root.glob("sys/devices/platform/soc*/*firmware/get_throttled"):
        word = _maybe(lambda text: int(text, 16), _text(path))
        if word is not None:
            now = [flag for bit, flag in enumerate(_PI_FLAGS) if word >> bit & 1]
            before = [f"{flag} since boot" for bit, flag in enumerate(_PI_FLAGS) if word >> (bit + _SINCE_BOOT) & 1]
            return ", ".join(now + before) or "no"
    counts = _numbers(root / "sys/devices/system/cpu", "cpu[0-9]*/thermal_throttle/core_throttle_count")
    return None if not counts else f"{sum(counts):.0f} times since boot"


def _power_source(folder: Path) -> str | None:
    found = set()
    for path in folder.glob("*/type"):
        kind, online, status = (_text(path.with_name(name)) for name in ("type", "online", "status"))
        if kind == "Battery" and status == "Discharging":
            found.add("battery")
        elif kind in ("Mains", "USB") and online == "1":
            found.add("mains")
    return " and ".join(sorted(found)) or None


T = TypeVar("T")


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes()[:65536].decode(errors="replace").strip("\0 \n") or None
    except OSError:  # not on this board, or not for us to read
        return None


def _maybe(made: Callable[[str], T], text: str | None) -> T | None:
    try:
        return None if not text else made(text)
    except ValueError:
        return None


def _number(path: Path) -> float | None:
    return _maybe(float, _text(path))


def _numbers(folder: Path, pattern: str) -> list[float]:
    return [number for path in folder.glob(pattern) if (number := _number(path)) is not None]


def _scaled(numbers: list[float], by: float) -> float | None:
    return max(numbers) / by if numbers else None


def _kilobytes(text: str | None, name: str) -> int | None:
    match = re.search(rf"^{name}:\s*(\d+) kB$", text or "", re.M)
    return None if match is None else int(match[1]) * 1024
