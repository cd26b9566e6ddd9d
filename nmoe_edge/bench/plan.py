"""What a benchmark is to measure: the options of `nmoe-edge bench`, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.bundle.fleet import FLEET_FILE
from nmoe_edge.errors import BenchError

Say = Callable[[str], None]
"""Prints a line of progress."""
SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""Working folder of the benchmark's processes, so that they import this nmoe_edge rather than files of the user."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of one benchmark; BenchError if they cannot work."""

    bundle: Path
    threads: tuple[int, ...] = (1,)
    provider: str = "auto"
    targets: tuple[str, ...] = ()
    """Addresses or names of the peers to measure."""
    latents: tuple[str, ...] = ("int8", "float16", "float32")
    fleet: Path | None = None
    key: Path | None = None
    duration_s: float = 10.0
    """Of each scenario, all rounds together."""
    rounds: int = 5
    clients: int = 1
    rate: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("duration", self.duration_s), ("rate", self.rate or 1.0)):
            if not 0 < value < float("inf"):  # written so that NaN is refused too
                raise BenchError(f"{what} is {value}; it must be a finite number above 0")
        if os.path.isfile(self.bundle / FLEET_FILE):
            raise BenchError(f"{self.bundle} is a fleet folder; measure one of its devices: {self.bundle}/NAME")

    @property
    def round_s(self) -> float:
        """Seconds of measuring in each round."""
        return self.duration_s / self.rounds
