"""What has to be trained: one unit for each training or measurement, in the order of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nmoe_train.results.baselines import METHODS, RIVALS
from nmoe_train.results.pages.formats import METHOD_NAMES
from nmoe_train.results.paper.published import SPLITS

EXTRACTORS = {"fedce": "FedCE", "fedsc": "FedSC"}
PARTITIONS = {1: SPLITS, 2: SPLITS[1:]}
"""The splits of both tables, as in the paper."""
FIGURE_3_PARTITION = "noniid:0.5"
CLIENTS = (5, 10, 20, 40)
"""Figure 4a: among how many clients the data set is split."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate of the tables."""

    name: str
    settings: Mapping[str, Any]
    """Of the section `gate`"""


GATES = {
    "fedgate": Gate("FedGate", {"method": "fedgate"}),
    "rangate": Gate("RanGate", {"method": "rangate"}),
    "rollgate": Gate("RollGate", {"method": "rollgate"}),
    "means": Gate("StatGate (means)", {"method": "statgate", "statistics": "means"}),
    "moments": Gate("StatGate (moments)", {"method": "statgate", "statistics": "moments"}),
}
"""Gates in the order of work. FedGate is first: the other gates and the baselines use its run."""

_PAPER_GATES = ("rangate", "rollgate", "fedgate")
_SHOWN_GATES = (*_PAPER_GATES, *[gate for gate in GATES if gate not in _PAPER_GATES])
BASELINES = {"baselines": METHODS, "rivals": RIVALS}
"""Baselines by the kind of unit that trains them: the paper's, and others."""
_SHOWN_BASELINES = ("centralised", "local", "fedavg", *RIVALS)
ROWS = MappingProxyType(
    {
        **{method: METHOD_NAMES[method] for method in _SHOWN_BASELINES},
        **{f"{e}-{gate}": f"{EXTRACTORS[e]} + {GATES[gate].name}" for e in EXTRACTORS for gate in _SHOWN_GATES},
    }
)
"""Rows of both tables in the paper's order, and others after them: a baseline, or extractor-gate."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work."""

    partition: str
    extractor: str
    kind: str
    """A gate; "baselines" or "rivals"; or "top-2" and so on: the run with FedGate, with so many experts per row"""
    seed: int
    clients: int | None = None
    """Figure 4a: number of clients. None: as in the tables"""
    samples: int | None = None
    """Figure 4a: training samples of a client"""

    @property
    def name(self) -> str:
        """The unit's folder, and its key in paper.json."""
        size = "" if self.clients is None else f"-{self.clients}x{self.samples}"
        return f"{self.partition.replace(':', '-')}-{self.extractor}-{self.kind}-{self.seed}{size}"

    @property
    def title(self) -> str:
        """For the progress of work."""
        size = "" if self.clients is None else f", {self.clients} clients"
        return f"{self.partition}, {self.extractor}, {self.kind}, seed {self.seed}{size}"

    @property
    def top_k(self) -> int | None:
        """Experts per row of a unit "top-…"."""
        kind, _, k = self.kind.partition("-")
        return int(k) if kind == "top" else None

    @property
    def base(self) -> Unit:
        """The unit with the run that this one starts from or measures."""
        return Unit(self.partition, self.extractor, "fedgate", self.seed, self.clients, self.samples)


def table_units(partitions: Sequence[str], seeds: int, rivals: bool = False) -> list[Unit]:
    """Everything that both tables show. FedSC, which takes longest, comes last.

    rivals: whether to train the baselines that the paper does not have
    """
    found = []
    for extractor in EXTRACTORS:
        baselines = BASELINES if rivals else ("baselines",)
        kinds = (*GATES, *baselines) if extractor == "fedce" else GATES
        for seed in range(seeds):
            for partition in partitions:
                found += [Unit(partition, extractor, kind, seed) for kind in kinds]
    return found


def figure_3_units(partition: str) -> list[Unit]:
    """Of the baselines' run only the baselines are shown, but they use its data."""
    base = Unit(partition, "fedce", "fedgate", 0)
    return [base, Unit(partition, "fedce", "baselines", 0), Unit(partition, "fedsc", "fedgate", 0)]


def split_units(sizes: Mapping[tuple[str, int], int | None], seeds: int) -> list[Unit]:
    """Figure 4a.

    sizes: {(partition, clients): samples of a client}; None where the run of the tables has this size
    """
    found = []
    for extractor in EXTRACTORS:
        for seed in range(seeds):
            for (partition, clients), samples in sizes.items():
                shape = () if samples is None else (clients, samples)
                found.append(Unit(partition, extractor, "fedgate", seed, *shape))
    return found


def top_k_units(partitions: Iterable[str], seeds: int, clients: int) -> list[Unit]:
    """Figure 4b: each run with FedGate, and then its measurement with every k."""
    found = []
    for extractor in EXTRACTORS:
        for seed in range(seeds):
            for partition in partitions:
                kinds = ["fedgate", *[f"top-{k}" for k in range(1, clients + 1)]]
                found += [Unit(partition, extractor, kind, seed) for kind in kinds]
    return found


def curve_units(partitions: Iterable[str]) -> list[Unit]:
    """The learning curves: each run with FedGate."""
    return [Unit(partition, extractor, "fedgate", 0) for extractor in EXTRACTORS for partition in partitions]
