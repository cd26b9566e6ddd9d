"""Trains and measures units. A finished unit is kept in paper.json, and an interrupted one is resumed.

So a folder grows over several calls until everything is there. Only one process at a time can work in a folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nmoe_edge.common.schema import to_plain
from nmoe_train.checkpoint import CHECKPOINT_FILE, claim_folder, difference, partial_folder
from nmoe_train.config import Config
from nmoe_train.data.clients import PAPER_SIZES, assign_samples
from nmoe_train.data.datasets import Dataset, load
from nmoe_train.data.partition import largest_size
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.pipeline import config_of, retrain_config, train
from nmoe_train.results.paper.folder import Done, Plan, read, write
from nmoe_train.results.paper.measured import baseline_figures, gate_figures
from nmoe_train.results.paper.units import BASELINES, GATES, Unit
from nmoe_train.run import RUN_FILE, Run, read_run
from nmoe_train.stages.federation import Round
from nmoe_train.trainer import Progress

UNSAVED_STAGES = ("experts", "mixture")
"""Stages that save nothing until they end. In others, stopping between two rounds loses nothing."""


class _TimeIsUpError(Exception):
    """The minutes are over. Everything so far is saved."""


def work(
    plan: Plan,
    wanted: Sequence[Unit],
    progress: Progress = lambda _: None,
    minutes: float | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Done:
    """Do the wanted units that paper.json does not hold yet, and return all its units.

    minutes: stop after this time, as soon as everything is saved; None: no limit
    announce: gets a line when a unit begins

    Raises TrainError: besides the errors of `train`, RunError when the folder holds other data, other settings or
    another process at work.
    """
    if minutes is not None and not minutes >= 0:
        raise ConfigError(f"--minutes is {minutes}; it must be 0 or more")
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    dataset = load(plan.data.name)
    done = read(plan, dataset)
    if all(unit.name in done for unit in wanted):
        return done
    _check_splits(plan, dataset, wanted)

    def progress_until_deadline(finished: Round) -> None:
        progress(finished)
        if time.monotonic() > deadline and finished.stage not in UNSAVED_STAGES:
            raise _TimeIsUpError

    with claim_folder(plan.out):
        done = read(plan, dataset)  # another process may have worked here until now
        try:
            for number, unit in enumerate(wanted, 1):
                if unit.name not in done:
                    announce(f"[{number}/{len(wanted)}] {unit.title}")
                    done[unit.name] = _figures(plan, unit, progress_until_deadline)
                    write(plan, dataset, done)
                    if time.monotonic() > deadline:
                        break
        except _TimeIsUpError:
            pass
    return done


def split_sizes(plan: Plan, partitions: Sequence[str], counts: Sequence[int]) -> dict[tuple[str, int], int | None]:
    """Figure 4a: how many samples each of so many clients gets, if all get the same data set together.

    Its size is the largest that every one of these splits allows. Returns {(partition, clients): samples}, with None
    where this is the size that the tables use.
    """
    data = plan.data
    dataset = load(data.name)
    classes = len(dataset.labels)
    maximum = data.train_size or PAPER_SIZES.get(data.name, (None, None))[0]
    limit = data.clients * maximum if maximum is not None else len(dataset.y_train)

    def size(partition: str, clients: int, total: int) -> int:
        return largest_size(dataset.y_train, partition, clients, classes, 0, total // clients)

    total = min(clients * size(partition, clients, limit) for partition in partitions for clients in counts)
    found: dict[tuple[str, int], int | None] = {}
    for partition in partitions:
        for clients in counts:
            samples = size(partition, clients, total)
            of_tables = clients == data.clients and samples == size(partition, clients, limit)
            found[partition, clients] = None if of_tables else samples
    return found


def _check_splits(plan: Plan, dataset: Dataset, wanted: Sequence[Unit]) -> None:
    """Refuse, before any training, a split that the data does not allow."""
    configs = {(unit.partition, unit.clients, unit.samples): plan.config(unit).data for unit in wanted}
    for data in configs.values():
        assign_samples(dataset, data, 0)


def _figures(plan: Plan, unit: Unit, progress: Progress) -> dict[str, Any]:
    """Train a unit, and return its figures as paper.json holds them."""
    base = _train(plan.out / unit.base.name, plan.config(unit.base), None, progress)
    if unit.kind in BASELINES:
        return baseline_figures(base, BASELINES[unit.kind], progress)
    if unit.kind == "fedgate" or unit.top_k == base.record.inference.top_k:
        return gate_figures(base)
    if unit.top_k is not None:
        return gate_figures(_evaluate(plan, base, unit.top_k))
    config = retrain_config(base, "gate", {"gate": dict(GATES[unit.kind].settings)})
    return gate_figures(_train(plan.out / unit.name, config, (base, "gate"), progress))


def _evaluate(plan: Plan, base: Run, top_k: int) -> Run:
    """The run with another number of experts per row, as `nmoe-train evaluate` makes it. Only its figures are kept."""
    config = retrain_config(base, "evaluate", {"inference": {"top_k": top_k}})
    with tempfile.TemporaryDirectory(dir=plan.out, prefix=".top-k-") as folder:
        return train(config, Path(folder) / "run", again=(base, "evaluate"))


def _train(folder: Path, config: Config, again: tuple[Run, str] | None, progress: Progress) -> Run:
    """Begin or resume a training. A finished run is returned as it is if it has this configuration."""
    has_checkpoint = (partial_folder(folder) / CHECKPOINT_FILE).exists()
    if has_checkpoint or not (folder / RUN_FILE).exists():
        return train(config, folder, resume=has_checkpoint, again=again, progress=progress)
    run = read_run(folder)
    found, wanted = (to_plain(replace(c, device="auto", threads=1)) for c in (config_of(run), config))
    differs = difference(found, wanted)
    if differs:
        raise RunError(
            f"{folder}: is a run with other settings than this table's: {differs}; move it, or choose another --out"
        )
    return run
