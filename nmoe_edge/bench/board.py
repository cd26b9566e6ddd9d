"""What /proc and /sys report about the board: model, load, temperature, a process's memory, the power drawn.

The root of these paths is an argument, so that tests can use a folder. What a board does not report is None, never a
guess.
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
"""(implementer, part) in /proc/cpuinfo -> core, for Raspberry Pis and Jetsons: their kernels give no model name."""
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Pi's get_throttled: what is true now. Bits 16 to 19: the same flags since boot."""
_SINCE_BOOT = 16
_TICK_NS = 200_000_000
"""Shortest time between two readings of the power."""
_RAIL = re.compile(r"VDD_IN|POM_5V_IN|VIN_SYS_5V0|VDD_5V_IN", re.I)
"""Names of the sensor of a Jetson's whole input power; they differ between models."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while the board runs."""

    board: str | None
    cpu: str | None
    cores: int | None
    memory_bytes: int | None
    kernel: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes: one reading."""

    load: float | None
    """Load average of the last minute."""
    governor: str | None
    mhz: float | None
    """Frequency of the fastest core now."""
    most_mhz: float | None
    """Highest frequency that any core supports."""
    temperature_c: float | None
    """Temperature of the hottest zone."""
    throttled: str | None
    power: str | None
    """Power source: battery, mains or both."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process, in bytes."""

    rss: int | None
    pss: int | None
    """Like rss, but a page shared by n processes counts 1/n."""
    peak: int | None
    """Largest rss so far."""


def read_machine(root: Path = ROOT) -> Machine:
    """Read the board's model, CPU and memory size."""
    info = _text(root / "proc/cpuinfo") or ""
    entries = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    arm = (entries.get("CPU implementer", ""), entries.get("CPU part", ""))
    unnamed = f"implementer {arm[0]}, part {arm[1]}" if all(arm) else None
    return Machine(
        board=_text(root / "proc/device-tree/model") or _text(root / "sys/devices/virtual/dmi/id/product_name"),
        cpu=entries.get("model name") or _ARM_CORES.get(arm) or unnamed,
        cores=len(re.findall(r"^processor\s*:", info, re.M)) or None,
        memory_bytes=_kilobytes(_text(root / "proc/meminfo"), "MemTotal"),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
    )


def read_moment(root: Path = ROOT) -> Moment:
    """Read the board's load, frequency, temperature and power source now."""
    cpus = root / "sys/devices/system/cpu"
    governors = {_text(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    zones = _numbers(root / "sys/class/thermal", "thermal_zone*/temp")
    return Moment(
        load=_parse(float, (_text(root / "proc/loadavg") or "").partition(" ")[0]),
        governor=", ".join(sorted(filter(None, governors))) or None,
        mhz=_largest(_numbers(cpus, "cpu[0-9]*/cpufreq/scaling_cur_freq"), 1000),
        most_mhz=_largest(_numbers(cpus, "cpu[0-9]*/cpufreq/cpuinfo_max_freq"), 1000),
        temperature_c=_largest(zones, 1000),
        throttled=_throttled(root),
        power=_power_source(root / "sys/class/power_supply"),
    )


def read_memory(root: Path = ROOT) -> Memory:
    """Read the memory of this process."""
    exact, status = _text(root / "proc/self/smaps_rollup"), _text(root / "proc/self/status")
    rss = _kilobytes(exact, "Rss")
    return Memory(
        rss=rss if rss is not None else _kilobytes(status, "VmRSS"),
        pss=_kilobytes(exact, "Pss"),
        peak=_kilobytes(status, "VmHWM"),
    )


class Meter:
    """Mean power from its creation to the last `tick`.

    Adds up the energy counters of the CPU packages (RAPL), or integrates the input power of a Jetson.
    """

    def __init__(self, now_ns: int, root: Path = ROOT) -> None:
        domains = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
        # The domain psys includes the packages, so it must not be added to them.
        packages = [path for path in domains if (_text(path / "name") or "").startswith("package")]
        self._counters = {path: _number(path / "energy_uj") for path in packages}
        labels = root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")
        self._rail = next((path for path in labels if _RAIL.search(_text(path) or "")), None)
        self._began_ns = now_ns
        self._last_ns = now_ns
        self._joules = 0.0
        self._watts = self._rail_w()

    def tick(self, now_ns: int) -> None:
        """Read the power, at most five times a second.

        Call it more often than once a minute: a counter that wraps around twice between readings loses energy.
        """
        if now_ns - self._last_ns < _TICK_NS:
            return
        for path, before in self._counters.items():
            now = _number(path / "energy_uj")
            if before is not None and now is not None:
                used_uj = now - before
                if used_uj < 0:  # the counter wrapped around
                    used_uj += _number(path / "max_energy_range_uj") or 0
                self._joules += used_uj / 1e6
            self._counters[path] = now
        watts = self._rail_w()
        if self._watts is not None and watts is not None:
            self._joules += (self._watts + watts) / 2 * (now_ns - self._last_ns) / 1e9
        self._watts = watts
        self._last_ns = now_ns

    @property
    def mean_w(self) -> float | None:
        """Mean power in watts; None if the board does not report it."""
        has_counters = bool(self._counters) and None not in self._counters.values()
        took_s = (self._last_ns - self._began_ns) / 1e9
        if took_s <= 0 or not (has_counters or self._watts is not None):
            return None
        return self._joules / took_s

    def _rail_w(self) -> float | None:
        """Present input power of a Jetson."""
        if self._rail is None:
            return None
        number = re.sub(r"\D", "", self._rail.name)
        millivolts = _number(self._rail.parent / f"in{number}_input")
        milliamperes = _number(self._rail.parent / f"curr{number}_input")
        if millivolts is None or milliamperes is None:
            return None
        return millivolts * milliamperes / 1e6


def _throttled(root: Path) -> str | None:
    """The flags of a Raspberry Pi, or how often Intel cores were throttled by heat."""
    for path in root.glob("sys/devices/platform/soc*/*firmware/get_throttled"):
        bits = _parse(lambda text: int(text, 16), _text(path))
        if bits is not None:
            now = [flag for bit, flag in enumerate(_PI_FLAGS) if bits >> bit & 1]
            before = [f"{flag} since boot" for bit, flag in enumerate(_PI_FLAGS) if bits >> (bit + _SINCE_BOOT) & 1]
            return ", ".join(now + before) or "no"
    counts = _numbers(root / "sys/devices/system/cpu", "cpu[0-9]*/thermal_throttle/core_throttle_count")
    return None if not counts else f"{sum(counts):.0f} times since boot"


def _power_source(folder: Path) -> str | None:
    sources = set()
    for path in folder.glob("*/type"):
        kind = _text(path)
        if kind == "Battery" and _text(path.with_name("status")) == "Discharging":
            sources.add("battery")
        elif kind in ("Mains", "USB") and _text(path.with_name("online")) == "1":
            sources.add("mains")
    return " and ".join(sorted(sources)) or None


T = TypeVar("T")


def _text(path: Path) -> str | None:
    """The text of a file without padding; None if it is empty or cannot be read."""
    try:
        return path.read_bytes()[:65536].decode(errors="replace").strip("\0 \n") or None
    except OSError:  # this board lacks the file, or only root may read it
        return None


def _parse(parse: Callable[[str], T], text: str | None) -> T | None:
    try:
        return None if not text else parse(text)
    except ValueError:
        return None


def _number(path: Path) -> float | None:
    return _parse(float, _text(path))


def _numbers(folder: Path, pattern: str) -> list[float]:
    """The numbers in the files that match the pattern, without those that cannot be read."""
    numbers = [_number(path) for path in folder.glob(pattern)]
    return [number for number in numbers if number is not None]


def _largest(numbers: list[float], divisor: float) -> float | None:
    return max(numbers) / divisor if numbers else None


def _kilobytes(text: str | None, name: str) -> int | None:
    """The entry `name` of a file such as /proc/meminfo, in bytes."""
    match = re.search(rf"^{name}:\s*(\d+) kB$", text or "", re.M)
    return None if match is None else int(match[1]) * 1024
