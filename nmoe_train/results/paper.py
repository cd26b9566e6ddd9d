"""The paper's tables and figures, ours beside theirs, from one folder of runs that grows until everything is there.

A unit is one training or one set of baselines. Those that are done are kept, one that was stopped goes on, and
paper.json holds what has been measured. `theirs` is the part of the published numbers that is known here.
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
from nmoe_train.checkpoint import NAME, difference, partial
from nmoe_train.config import Config, configure
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.pipeline import retrained, train
from nmoe_train.results.baselines import METHODS as BASELINES
from nmoe_train.results.baselines import baselines
from nmoe_train.results.pages.charts import Figure, curves, figure, heat_map
from nmoe_train.results.pages.render import FIGURES, render
from nmoe_train.run import RUN_FILE, Run, read_run
from nmoe_train.stages.federation import Round
from nmoe_train.trainer import Progress

FILE = "paper.json"
PARTITIONS = ("iid", "noniid:0.5", "noniid:0.3", "noniid:0.2")
GATES = ("fedgate", "rangate", "rollgate")
ROWS = {
    "local": "local classifier",
    "fedavg": "FedAvg classifier",
    "centralised": "centralised mixture",
    **{f"{e}-{g}": f"{e_name} + {g_name}" for e, e_name in (("fedce", "FedCE"), ("fedsc", "FedSC"))
       for g, g_name in (("rangate", "RanGate"), ("rollgate", "RollGate"), ("fedgate", "FedGate"))},
}  # fmt: skip
THEIRS = {
    ("local", "noniid:0.5"): (66.66, 8.00, 50.0),
    ("local", "noniid:0.3"): (76.92, 8.69, 50.0),
    ("local", "noniid:0.2"): (83.33, 9.09, 50.0),
}
"""Table 1: accuracy, macro F1 and AUC in percent. It is a classifier that always says the client's own class."""
THEIR_SHARE_KEPT = {"fedsc": 25, "centralised": 8}
"""Figure 3: percent of the rows that stay at home."""


SAVED = ("extractor", "gate", *BASELINES)
"""Stages whose every round is saved: between them nothing is lost by stopping."""
OURS = ("seed", "data.partition", "extractor.method", "gate.method")
"""Settings that tell the units apart."""


class _SpentError(Exception):
    """The time that was given is over; everything up to here is kept."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: a training of one stage or more, or baselines."""

    partition: str
    extractor: str
    kind: str
    """A gate, or `baselines`."""
    seed: int

    @property
    def name(self) -> str:
        """Its folder, and its key in paper.json."""
        return f"{self.partition.replace(':', '-')}-{self.extractor}-{self.kind}-{self.seed}"


def units(partitions: Sequence[str], seeds: int) -> list[Unit]:
    """What there is to do: FedCE before FedSC, the gates of an extractor one after another."""
    return [
        Unit(partition, extractor, kind, seed)
        for extractor in ("fedce", "fedsc")
        for seed in range(seeds)
        for partition in partitions
        for kind in (*GATES, *(("baselines",) if extractor == "fedce" else ()))
    ]


def work(
    out: Path,
    recipe: str,
    flags: Mapping[str, Any],
    due: Sequence[Unit],
    progress: Progress,
    minutes: float | None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do what is not done yet, until the minutes are over, and return paper.json's units."""
    if minutes is not None and not minutes >= 0:
        raise ConfigError(f"--minutes {minutes}: not a number from 0 on")
    for place in OURS:
        section, _, name = place.rpartition(".")
        if name in (flags.get(section, {}) if section else flags):
            raise ConfigError(f"{place} is what the table goes through: leave it out")
    until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    done = _read(out, recipe, flags)

    def told(round_: Round) -> None:
        progress(round_)
        if time.monotonic() > until and round_.stage in SAVED:
            raise _SpentError

    try:
        for number, unit in enumerate(due, 1):
            if unit.name not in done:
                say(f"[{number}/{len(due)}] {unit.partition}, {unit.extractor}, {unit.kind}, seed {unit.seed}")
                done[unit.name] = _figures(out, unit, recipe, flags, told)
                _write(out, recipe, flags, done)
    except _SpentError:
        pass
    return done


def _figures(out: Path, unit: Unit, recipe: str, flags: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """What a unit measured."""
    base = Unit(unit.partition, unit.extractor, "fedgate", unit.seed)
    if unit.kind == "fedgate":
        run = _trained(out / unit.name, _config(unit, recipe, flags), None, progress)
    elif unit.kind == "baselines":
        return baselines(read_run(out / base.name), progress)
    else:
        kept = read_run(out / base.name)
        run = _trained(
            out / unit.name, retrained(kept, "gate", {"gate": {"method": unit.kind}}), (kept, "gate"), progress
        )
    metrics = run.metrics
    figures = {part: metrics[part]["networked"] for part in ("own", "iid")}
    figures["own"] |= {"routing": metrics["own"]["routing"], "kept_local": metrics["own"]["kept_local"]}
    return {**figures, "history": metrics["history"], "privacy": metrics.get("privacy")}


def _trained(folder: Path, config: Config, again: tuple[Run, str] | None, progress: Progress) -> Run:
    if (folder / RUN_FILE).exists() and not (partial(folder) / NAME).exists():
        return read_run(folder)
    return train(config, folder, resume=(partial(folder) / NAME).exists(), again=again, progress=progress)


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
            raise ValueError("not what nmoe-train writes there")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; choose another --out") from error
    differs = difference(plain.get("settings", {}), _settings(recipe, flags))
    if differs:
        raise RunError(f"{path}: made with other settings: {differs}; choose another --out")
    return plain["units"]


def _write(out: Path, recipe: str, flags: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / FILE, json.dumps({"settings": _settings(recipe, flags), "units": done}) + "\n")
    except OSError as error:
        raise RunError(f"{out / FILE}: cannot be written: {error.strerror}") from error


def _settings(recipe: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of every unit, but for what tells the units apart."""
    return {e: to_plain(_config(Unit("iid", e, "fedgate", 0), recipe, flags)) for e in ("fedce", "fedsc")}


def figures_of(done: Mapping[str, Any], row: str, partition: str, part: str, seeds: int) -> list[Mapping[str, Any]]:
    """The figures of one cell, one a seed, as far as they are there."""
    extractor, _, gate = row.partition("-")
    found = []
    for seed in range(seeds):
        if row in BASELINES:
            unit = done.get(Unit(partition, "fedce", "baselines", seed).name)
            found.append(unit[row][part] if unit else None)
        else:
            unit = done.get(Unit(partition, extractor, gate, seed).name)
            found.append(unit[part] if unit else None)
    return [figures for figures in found if figures]


def table(number: int, done: Mapping[str, Any], seeds: int) -> str:
    """Table 1 (each client's own distribution) or 2 (the balanced test): accuracy/macro F1/AUC in percent."""
    part = {1: "own", 2: "iid"}[number]
    lines = [f"{'':<22}" + "".join(f"{partition:>22}" for partition in PARTITIONS)]
    for row, name in ROWS.items():
        cells = [_cell(figures_of(done, row, partition, part, seeds)) for partition in PARTITIONS]
        lines.append(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
        theirs = [THEIRS.get((row, partition)) if number == 1 else None for partition in PARTITIONS]
        if any(theirs):
            cells = ["/".join(f"{value:.1f}" for value in known) if known else "–" for known in theirs]
            lines.append(f"{'  the paper':<22}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "–"
    means = []
    for key in ("accuracy", "macro_f1", "auc"):
        values = [figures[key] for figures in found if figures[key] is not None]
        means.append(f"{100 * float(np.mean(values)):.1f}" if values else "–")
    return "/".join(means)


FIGURE_PARTITION = "noniid:0.5"


def draw(out: Path, number: int, done: Mapping[str, Any]) -> Path:
    """Figure 3 (who asks whom) or 4 (how it learned) as a page in `out`."""
    charts = list(_heat_maps(done) if number == 3 else _curves(done))
    title = {3: "Who asks whom", 4: "How it learned"}[number]
    path = out / f"figure-{number}.html"
    try:
        path.write_text(render(FIGURES, title=f"Figure {number}: {title}, {FIGURE_PARTITION}", figures=charts))
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _heat_maps(done: Mapping[str, Any]) -> Iterator[Figure]:
    for row in ("fedce-fedgate", "fedsc-fedgate", "centralised"):
        (figures,) = figures_of(done, row, FIGURE_PARTITION, "own", 1)
        kept, theirs = figures["kept_local"], THEIR_SHARE_KEPT.get(row.partition("-")[0])
        beside = f"; in the paper {theirs} %" if theirs else ""
        names = [str(i) for i in range(len(figures["routing"]))]
        caption = f"{ROWS[row]}: {100 * kept:.0f} % of the rows stay at home{beside}. Rows ask, columns are asked."
        yield figure(heat_map, figures["routing"], names, names, caption=caption)


def _curves(done: Mapping[str, Any]) -> Iterator[Figure]:
    names = {"fedce": "FedCE", "fedsc": "FedSC"}
    history = {e: done[Unit(FIGURE_PARTITION, e, "fedgate", 0).name]["history"] for e in names}

    def series(extractor: str, stage: str, key: str) -> list[tuple[float, float]]:
        return [(e["round"], e[key]) for e in history[extractor] if e["stage"] == stage and key in e]

    accuracy = [(round_, 100 * share) for round_, share in series("fedce", "extractor", "accuracy")]
    told = "The classifier that FedCE trains, on its own training samples: higher is better."
    yield figure(curves, {"FedCE": accuracy}, "round", "percent", caption=told)
    for extractor, name in names.items():
        loss = {name: series(extractor, "extractor", "loss")}
        yield figure(curves, loss, "round", "loss", caption=f"{name}'s own loss: lower is better.")
    gates = {f"on {name}": series(extractor, "gate", "loss") for extractor, name in names.items()}
    yield figure(curves, gates, "round", "loss", caption="FedGate's loss on either extractor: lower is better.")
