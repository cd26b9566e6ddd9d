"""The folder of a table: its runs and paper.json, which holds what has been measured.

paper.json also names the data and every setting that its figures share. Other data and other settings are refused, so
one folder never mixes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe_edge.common.files import replace_file
from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_train.checkpoint import difference
from nmoe_train.config import Config, DataConfig
from nmoe_train.data.datasets import Dataset
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.recipes import configure
from nmoe_train.results.paper.units import EXTRACTORS, Unit

FILE = "paper.json"
SCHEMA = 2
VARIED = ("seed", "data.partition", "extractor.method", "gate.method")
"""Settings that differ between units."""

Done = dict[str, Any]
"""The figures of each finished unit, by its name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A folder and the settings that its units share. ConfigError for a setting that varies between units."""

    out: Path
    recipe: str
    flags: Mapping[str, Any]
    """Nested by section"""

    def __post_init__(self) -> None:
        for setting in VARIED:
            section, _, name = setting.rpartition(".")
            given = self.flags.get(section, {}) if section else self.flags
            if name in given:
                raise ConfigError(f"{setting} varies over the table; leave it out")

    @property
    def path(self) -> Path:
        return self.out / FILE

    @property
    def data(self) -> DataConfig:
        """Of the tables; partitions differ between units."""
        return self.config(Unit("iid", "fedce", "fedgate", 0)).data

    def config(self, unit: Unit) -> Config:
        """The configuration of a unit's run; its gate is FedGate."""
        sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.flags.items()}
        sections["seed"] = unit.seed
        sections["data"] = {**sections.get("data", {}), "partition": unit.partition}
        if unit.clients is not None:
            sections["data"] |= {"clients": unit.clients, "train_size": unit.samples}
        sections["extractor"] = {**sections.get("extractor", {}), "method": unit.extractor}
        sections["gate"] = {**sections.get("gate", {}), "method": "fedgate"}
        if unit.extractor != "fedsc":
            sections.pop("fedsc", None)
        return configure(self.recipe, flags=sections)

    def settings(self) -> dict[str, Any]:
        """Every shared setting, by extractor."""
        return {extractor: _shared(self.config(Unit("iid", extractor, "fedgate", 0))) for extractor in EXTRACTORS}


def _shared(config: Config) -> dict[str, Any]:
    """What all units have in common. Device and threads may change: they affect the last digits alone."""
    plain = to_plain(config)
    for setting in (*VARIED, "device", "threads"):
        section, _, name = setting.rpartition(".")
        (plain[section] if section else plain).pop(name)
    return plain


def read(plan: Plan, dataset: Dataset | None) -> Done:
    """The finished units; none if there is no paper.json.

    dataset: the data that the figures must come from. None: whatever data and settings they come from

    RunError: the file is damaged, or its data or settings are other ones.
    """
    if not plan.path.exists():
        return {}
    try:
        plain = parse_json(plan.path.read_bytes())
        if not (isinstance(plain, dict) and isinstance(plain.get("units"), dict)):
            raise ValueError("not a paper.json of nmoe-train")
        if plain.get("schema") != SCHEMA:
            raise ValueError("another version of nmoe wrote it")
    except (OSError, ValueError) as error:
        raise RunError(f"{plan.path}: {error}; choose another --out") from error
    if dataset is None:
        return plain["units"]
    try:
        stored = plain["settings"].items()
        # A setting that is missing is newer than the file; its default changes nothing.
        settings = {extractor: _shared(from_plain(Config, config)) for extractor, config in stored}
    except (AttributeError, KeyError, ValueError) as error:
        raise RunError(f"{plan.path}: another version of nmoe wrote its settings; choose another --out") from error
    differs = difference(settings, plan.settings())
    if differs:
        raise RunError(f"{plan.path}: was made with other settings: {differs}; choose another --out")
    made_with = plain.get("data", {}).get("fingerprint", "")
    if made_with != dataset.fingerprint():
        raise RunError(
            f"{plan.path}: was made with other data named {dataset.name} (fingerprint {made_with[:12]}, and now"
            f" {dataset.fingerprint()[:12]}); restore the data, or choose another --out"
        )
    return plain["units"]


def write(plan: Plan, dataset: Dataset, done: Done) -> None:
    """Replace paper.json, with one line for each unit so that versions can be compared."""
    head = {
        "schema": SCHEMA,
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint()},
        "settings": plan.settings(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    units = ",\n".join(f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in sorted(done.items()))
    lines.append(f'"units": {{\n{units}\n}}')
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        replace_file(plan.path, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        raise RunError(f"{plan.path}: cannot be written: {error.strerror}") from error
