"""The paper's tables and figures: our figures and the paper's, from one folder of runs.

The work is cut into units: one training, or one set of baselines. A finished unit is kept and an interrupted one is
resumed, so the folder grows over several calls until everything is there. paper.json holds what has been measured.
PAPER_FIGURES holds only those of the paper's numbers that we know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmoe_edge.common.files import replace_file
from nmoe_edge.common.schema import parse_json, to_plain
from nmoe_train.checkpoint import CHECKPOINT_FILE, difference, partial_folder
from nmoe_train.config import Config
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.pipeline import retrain_config, train
from nmoe_train.recipes import configure
from nmoe_train.results.baselines import METHODS as BASELINES
from nmoe_train.results.baselines import baselines
from nmoe_train.results.pages.charts import Figure, curves, figure, heat_map
from nmoe_train.results.pages.formats import METHOD_NAMES
from nmoe_train.results.pages.render import FIGURES, render
from nmoe_train.run import RUN_FILE, Run, read_run
from nmoe_train.stages.federation import Round
from nmoe_train.trainer import Progress

FILE = "paper.json"
PARTITIONS = ("iid", "noniid:0.5", "noniid:0.3", "noniid:0.2")
GATES = ("fedgate", "rangate", "rollgate")
ROWS = {
    **{method: METHOD_NAMES[method] for method in BASELINES},
    "fedce-rangate": "FedCE + RanGate",
    "fedce-rollgate": "FedCE + RollGate",
    "fedce-fedgate": "FedCE + FedGate",
    "fedsc-rangate": "FedSC + RanGate",
    "fedsc-rollgate": "FedSC + RollGate",
    "fedsc-fedgate": "FedSC + FedGate",
}
"""Rows of both tables: a baseline, or extractor-gate."""
PAPER_FIGURES = {
    ("local", "noniid:0.5"): (66.66, 8.00, 50.0),
    ("local", "noniid:0.3"): (76.92, 8.69, 50.0),
    ("local", "noniid:0.2"): (83.33, 9.09, 50.0),
}
"""The paper's table 1: accuracy, macro F1 and AUC in percent. They are those of a classifier that always answers the
client's own class."""
PAPER_LOCAL_SHARE = {"fedsc": 25, "centralised": 8}
"""The paper's figure 3: percent of the rows that are answered locally."""
FIGURE_PARTITION = "noniid:0.5"
"""The split of figures 3 and 4."""

SAVED_STAGES = ("extractor", "gate", *BASELINES)
"""Stages that save every round: stopping between two rounds loses nothing."""
UNIT_SETTINGS = ("seed", "data.partition", "extractor.method", "gate.method")
"""Settings that differ between units."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: a training, or the baselines of one."""

    partition: str
    extractor: str
    kind: str
    """A gate, or `baselines`."""
    seed: int

    @property
    def name(self) -> str:
        """The unit's folder, and its key in paper.json."""
        return f"{self.partition.replace(':', '-')}-{self.extractor}-{self.kind}-{self.seed}"


def units(partitions: Sequence[str], seeds: int) -> list[Unit]:
    """All units in the order of work. FedGate comes first: the other gates and the baselines use its run."""
    found = []
    for extractor in ("fedce", "fedsc"):
        kinds = (*GATES, "baselines") if extractor == "fedce" else GATES
        for seed in range(seeds):
            for partition in partitions:
                found += [Unit(partition, extractor, kind, seed) for kind in kinds]
    return found


class _TimeIsUpError(Exception):
    """The minutes are over. Everything so far is saved."""


def work(
    out: Path,
    recipe: str,
    flags: Mapping[str, Any],
    wanted: Sequence[Unit],
    progress: Progress,
    minutes: float | None,
    announce: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do the wanted units that paper.json does not hold yet, and return all its units by name.

    out: the folder of the runs and of paper.json
    flags: settings that all units share, nested by section
    minutes: stop at the first saved round after this time; None: no limit
    announce: gets a line when a unit begins
    """
    if minutes is not None and not minutes >= 0:
        raise ConfigError(f"--minutes is {minutes}; it must be 0 or more")
    for setting in UNIT_SETTINGS:
        section, _, name = setting.rpartition(".")
        given = flags.get(section, {}) if section else flags
        if name in given:
            raise ConfigError(f"{setting} varies over the table; leave it out")
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    done = _read(out, recipe, flags)

    def progress_until_deadline(finished: Round) -> None:
        progress(finished)
        if time.monotonic() > deadline and finished.stage in SAVED_STAGES:
            raise _TimeIsUpError

    try:
        for number, unit in enumerate(wanted, 1):
            if unit.name not in done:
                announce(f"[{number}/{len(wanted)}] {unit.partition}, {unit.extractor}, {unit.kind}, seed {unit.seed}")
                done[unit.name] = _figures(out, unit, recipe, flags, progress_until_deadline)
                _write(out, recipe, flags, done)
    except _TimeIsUpError:
        pass
    return done


def _figures(out: Path, unit: Unit, recipe: str, flags: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train a unit, and return its figures as paper.json holds them."""
    base = out / Unit(unit.partition, unit.extractor, "fedgate", unit.seed).name
    if unit.kind == "baselines":
        return baselines(read_run(base), progress, BASELINES)
    if unit.kind == "fedgate":
        run = _train(base, _config(unit, recipe, flags), None, progress)
    else:
        base_run = read_run(base)
        config = retrain_config(base_run, "gate", {"gate": {"method": unit.kind}})
        run = _train(out / unit.name, config, (base_run, "gate"), progress)
    metrics = run.metrics
    figures = {part: metrics[part]["networked"] for part in ("own", "iid")}
    figures["own"] |= {"routing": metrics["own"]["routing"], "kept_local": metrics["own"]["kept_local"]}
    return {**figures, "history": metrics["history"], "privacy": metrics.get("privacy")}


def _train(folder: Path, config: Config, again: tuple[Run, str] | None, progress: Progress) -> Run:
    """Begin or resume a training; a finished run is returned as it is."""
    has_checkpoint = (partial_folder(folder) / CHECKPOINT_FILE).exists()
    if (folder / RUN_FILE).exists() and not has_checkpoint:
        return read_run(folder)
    return train(config, folder, resume=has_checkpoint, again=again, progress=progress)


def _config(unit: Unit, recipe: str, flags: Mapping[str, Any]) -> Config:
    sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in flags.items()}
    sections["seed"] = unit.seed
    sections["data"] = {**sections.get("data", {}), "partition": unit.partition}
    sections["extractor"] = {**sections.get("extractor", {}), "method": unit.extractor}
    sections["gate"] = {**sections.get("gate", {}), "method": "fedgate"}
    if unit.extractor != "fedsc":
        sections.pop("fedsc", None)
    return configure(recipe, flags=sections)


def _read(out: Path, recipe: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    path = out / FILE
    if not path.exists():
        return {}
    try:
        plain = parse_json(path.read_bytes())
        if not (isinstance(plain, dict) and isinstance(plain.get("units"), dict)):
            raise ValueError("not a paper.json of nmoe-train")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; choose another --out") from error
    differs = difference(plain.get("settings", {}), _settings(recipe, flags))
    if differs:
        raise RunError(f"{path}: was made with other settings: {differs}; choose another --out")
    return plain["units"]


def _write(out: Path, recipe: str, flags: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / FILE, json.dumps({"settings": _settings(recipe, flags), "units": done}) + "\n")
    except OSError as error:
        raise RunError(f"{out / FILE}: cannot be written: {error.strerror}") from error


def _settings(recipe: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that the units share, by extractor: paper.json holds them, and other ones are refused."""
    return {
        extractor: to_plain(_config(Unit("iid", extractor, "fedgate", 0), recipe, flags))
        for extractor in ("fedce", "fedsc")
    }


def figures_of(done: Mapping[str, Any], row: str, partition: str, part: str, seeds: int) -> list[Mapping[str, Any]]:
    """The figures of one cell that are there: at most one per seed."""
    extractor, _, gate = row.partition("-")
    found = []
    for seed in range(seeds):
        if row in BASELINES:
            unit = done.get(Unit(partition, "fedce", "baselines", seed).name)
            figures = unit[row][part] if unit else None
        else:
            unit = done.get(Unit(partition, extractor, gate, seed).name)
            figures = unit[part] if unit else None
        if figures:
            found.append(figures)
    return found


def table(number: int, done: Mapping[str, Any], seeds: int) -> str:
    """Table 1 (each client's own distribution) or 2 (the balanced test set): accuracy/macro F1/AUC in percent."""
    part = {1: "own", 2: "iid"}[number]
    lines = [_line("", PARTITIONS)]
    for row, name in ROWS.items():
        lines.append(_line(name, [_cell(figures_of(done, row, partition, part, seeds)) for partition in PARTITIONS]))
        published = [PAPER_FIGURES.get((row, partition)) for partition in PARTITIONS]
        if number == 1 and any(published):
            lines.append(_line("  the paper", [_published_cell(figures) for figures in published]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells)


def _published_cell(figures: tuple[float, ...] | None) -> str:
    return "/".join(f"{value:.1f}" for value in figures) if figures else "–"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "–"
    means = []
    for key in ("accuracy", "macro_f1", "auc"):
        values = [figures[key] for figures in found if figures[key] is not None]
        means.append(f"{100 * float(np.mean(values)):.1f}" if values else "–")
    return "/".join(means)


def draw(out: Path, number: int, done: Mapping[str, Any]) -> Path:
    """Write figure 3 (which device asks which expert) or 4 (learning curves) as an HTML page in `out`."""
    charts = list(_heat_maps(done) if number == 3 else _curves(done))
    title = {3: "Which device asks which expert", 4: "Learning curves"}[number]
    path = out / f"figure-{number}.html"
    try:
        replace_file(path, render(FIGURES, title=f"Figure {number}: {title}, {FIGURE_PARTITION}", figures=charts))
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _heat_maps(done: Mapping[str, Any]) -> Iterator[Figure]:
    for row in ("fedce-fedgate", "fedsc-fedgate", "centralised"):
        (figures,) = figures_of(done, row, FIGURE_PARTITION, "own", 1)
        kept = figures["kept_local"]
        published = PAPER_LOCAL_SHARE.get(row.partition("-")[0])
        in_the_paper = f"; in the paper {published} %" if published else ""
        names = [str(i) for i in range(len(figures["routing"]))]
        caption = (
            f"{ROWS[row]}: {100 * kept:.0f} % of the rows are answered locally{in_the_paper}."
            " Each row of the map is a device, each column an expert that it asks."
        )
        yield figure(heat_map, figures["routing"], names, names, caption=caption)


def _curves(done: Mapping[str, Any]) -> Iterator[Figure]:
    names = {"fedce": "FedCE", "fedsc": "FedSC"}
    history = {e: done[Unit(FIGURE_PARTITION, e, "fedgate", 0).name]["history"] for e in names}

    def series(extractor: str, stage: str, key: str) -> list[tuple[float, float]]:
        entries = [entry for entry in history[extractor] if entry["stage"] == stage and key in entry]
        return [(entry["round"], entry[key]) for entry in entries]

    accuracy = [(round_, 100 * share) for round_, share in series("fedce", "extractor", "accuracy")]
    caption = "Accuracy of FedCE's classifier on its training samples: higher is better."
    yield figure(curves, {"FedCE": accuracy}, "round", "percent", caption=caption)
    for extractor, name in names.items():
        loss = {name: series(extractor, "extractor", "loss")}
        yield figure(curves, loss, "round", "loss", caption=f"Loss of {name}: lower is better.")
    gates = {f"on {name}": series(extractor, "gate", "loss") for extractor, name in names.items()}
    yield figure(curves, gates, "round", "loss", caption="Loss of FedGate on each extractor: lower is better.")
