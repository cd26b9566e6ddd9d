"""Recipes, and how defaults, recipe, file and flags combine into one Config.

Flags override a TOML file, the file overrides the recipe, and the recipe overrides the defaults. Unknown keys are
refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmoe_edge.common.schema import from_plain, parse_json, to_plain
from nmoe_train.config import Config
from nmoe_train.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "extractor": {"head": "linear"},
        "experts": {"loss": "plain", "start": "fresh", "rate": 2e-3},
        "gate": {"method": "fedgate", "loss": "outputs", "load_loss": 0.001},
        "inference": {"local_first": False, "calibrate": False, "adapt": False},
    },
    "apart": {
        "data": {"partition": "classes:2"},
        "extractor": {"head": "linear", "rounds": 40},
        "experts": {"start": "fresh", "rate": 2e-3},
        "gate": {"method": "statgate", "statistics": "means"},
    },
}
"""What each recipe changes. "best" is the defaults; in "apart" each device knows two classes and needs the others."""

METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("fedsc", ""): {
        "extractor": {"batch": 512, "local_epochs": 5, "rounds": 200, "rate": 0.03},
        "experts": {"start": "fresh", "rate": 2e-3},
    },
    ("fedsc", "digits"): {
        "extractor": {"batch": 35, "local_epochs": 5, "rounds": 60, "rate": 0.1},
        "fedsc": {"views": "crop", "radius": 20.0},
    },
}
"""Defaults of a stage-1 method, for every data set ("") and for some."""

DATA: dict[str, dict[str, Any]] = {
    "cifar10": {
        "extractor": {"dim": 128, "batch": 50, "rounds": 100, "views": "light"},
        "experts": {"widths": [128, 64, 64], "batch": 50},
        "fedsc": {"projector": 256},
    },
}
"""Defaults for larger data sets."""
DATA |= dict.fromkeys(("fashion-mnist", "cifar100", "stl10"), DATA["cifar10"])
# A mirrored digit or letter is another one.
_SHIFTED = DATA["cifar10"] | {"extractor": DATA["cifar10"]["extractor"] | {"views": "shift"}}
DATA |= dict.fromkeys(("mnist", "kmnist", "emnist", "qmnist", "usps", "svhn"), _SHIFTED)
RECIPE_DATA: dict[tuple[str, str], dict[str, Any]] = {
    ("paper", name): {
        "extractor": {"dim": 512},
        "fedsc": {"projector": 1024},
        "experts": {"widths": [256, 128, 64]},
    }
    for name in ("cifar10", "cifar100")
}
"""What a recipe changes for some data sets: the paper's latents of 512 numbers and its projector of 512-1024-512."""
SECTIONS = ("data", "extractor", "fedsc", "experts", "gate", "inference")


def configure(recipe: str = "best", file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The defaults, changed in this order by data set, recipe, stage-1 method, file and flags. ConfigError if invalid.

    file: TOML, or a run.json with every setting; flags: nested like the file, for example {"gate": {"rounds": 50}}
    """
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    try:
        given = _merge(_settings(file) if file is not None else {}, flags or {})
        plain = to_plain(Config())
        name = _chosen(given, plain, "data", "name")
        method = _chosen(given, plain, "extractor", "method")
        of_method = [METHODS.get((method, data), {}) for data in ("", name)]
        of_data = (DATA.get(name, {}), RECIPES[recipe], RECIPE_DATA.get((recipe, name), {}))
        for changes in (*of_data, *of_method, given):
            plain = _merge(plain, changes)
        return from_plain(Config, plain)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; --config takes a TOML file or a run.json") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from error


def configure_from(config: Config, flags: Mapping[str, Any]) -> Config:
    """`config` with some settings changed; if a method changes, the new one's defaults apply first."""
    plain = to_plain(config)
    try:
        method = _chosen(flags, plain, "extractor", "method")
        if method != config.extractor.method:
            usual = to_plain(configure(flags={"data": {"name": config.data.name}, "extractor": {"method": method}}))
            kept = {key: plain["extractor"][key] for key in ("backbone", "arguments", "dim")}
            start = {"start": "fresh", "rate": 2e-3} if method == "fedsc" else {}
            changes = {"extractor": {**usual["extractor"], **kept}, "fedsc": usual["fedsc"], "experts": start}
            plain = _merge(plain, changes)
        if _chosen(flags, plain, "gate", "method") != config.gate.method:
            plain = _merge(plain, {"gate": {"own": "nothing"}})  # only FedGate has a part of its own
        return from_plain(Config, _merge(plain, flags))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _settings(file: Path) -> Mapping[str, Any]:
    if file.suffix != ".json":
        return tomllib.loads(file.read_text(encoding="utf-8"))
    plain = parse_json(file.read_bytes())
    if not (isinstance(plain, dict) and isinstance(plain.get("config"), dict)):
        raise ValueError("this is not a run.json: the key config is missing")
    return plain["config"]


def _chosen(given: Mapping[str, Any], usual: Mapping[str, Any], section: str, name: str) -> str:
    """A setting that other defaults depend on, as text; `from_plain` refuses other types later."""
    table = given.get(section)
    if isinstance(table, Mapping) and name in table:
        return str(table[name])
    return str(usual[section][name])


def _merge(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` with `changes` applied, table by table."""
    merged = dict(plain)
    for key, value in changes.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged
