"""A whole training: data -> extractor -> experts -> gate -> evaluate -> run.

Every round leaves a checkpoint; whatever is random is drawn from (seed, stage, round, client). So a training that was
killed at any moment goes on to the same numbers. A stage of a finished run can be trained again with other settings:
what came before it is taken from the run, and what stands on it is trained anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nmoe_edge.common.folders import check_replaceable
from nmoe_edge.common.schema import from_plain, to_plain
from nmoe_train.checkpoint import NAME, Checkpoint, claimed, difference, partial
from nmoe_train.config import Config, configure_from
from nmoe_train.data.clients import deal
from nmoe_train.data.datasets import load
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.results.pages.run_page import page
from nmoe_train.run import FILES, RUN_FILE, Run, read_run, write_run
from nmoe_train.stages.gate import exported
from nmoe_train.trainer import STAGES, Progress, Trainer


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    again: tuple[Run, str] | None = None,
    progress: Progress = lambda _: None,
) -> Run:
    """Train, and write the run to `out`; its checkpoint lies in `<out>.partial` until then.

    again: a finished run and its stage from which on it is trained again
    """
    device = _device(config)
    config = replace(config, device=device.type)  # which belongs to the numbers
    with claimed(out) as path, surroundings(config.threads):
        if resume and _finished(out):
            path.unlink()  # killed between the run and the end of its checkpoint
            return read_run(out)
        checkpoint = _begin(config, out, path, resume, again[1] if again else "run")
        dataset = load(config.data.name)
        clients = deal(dataset, config.data, config.seed)
        if checkpoint.fingerprint not in ("", clients.fingerprint):
            raise RunError(f"{path}: cannot go on with other data: what was trained on has changed since")
        fleet = Trainer(config, dataset, clients, device)
        if not checkpoint.states:
            checkpoint = replace(fleet.begun(checkpoint, again), fingerprint=clients.fingerprint)
            checkpoint.write(path)
        checkpoint = fleet.trained(checkpoint, lambda c: c.write(path), progress)
        began = time.perf_counter()
        record, metrics = fleet.evaluated(checkpoint)
        seconds = checkpoint.seconds | {"evaluate": time.perf_counter() - began}
        metrics |= {"history": checkpoint.history, "seconds": seconds | {"all": sum(seconds.values())}}
        _refuse_finished(out)
        run = write_run(
            out,
            record,
            extractor=fleet.net.extractor.state_dict(),
            heads=fleet.heads(checkpoint),
            gates=[exported(gate) for gate in checkpoint.states["gate"][: None if record.personal_gates else 1]],
            experts=checkpoint.states["experts"],
            calibration={
                "inputs": torch.cat([x for x, _ in clients.held_out]).numpy(),
                "labels": torch.cat([y for _, y in clients.held_out]).numpy(),
                "clients": np.repeat(np.arange(len(clients.held_out)), [len(y) for _, y in clients.held_out]),
            },
            metrics=metrics,
            report=page(out.name, to_plain(config), metrics, dataset.labels),
        )
        path.unlink()
        return run


def stopped_config(out: Path) -> Config:
    """The configuration of the training that stopped at `out`, or had just finished there."""
    if os.path.isfile(out / RUN_FILE):
        return configured(read_run(out))
    path = partial(out) / NAME
    try:
        return from_plain(Config, Checkpoint.read(path).config)
    except ValueError as error:
        raise RunError(f"{path}: of another version: {error}") from error


def configured(run: Run) -> Config:
    """The configuration of a finished run."""
    try:
        return from_plain(Config, run.record.config)
    except ValueError as error:
        raise RunError(f"{run.folder}: its settings are of another version: {error}") from error


def retrained(run: Run, stage: str, flags: Mapping[str, Any]) -> Config:
    """The configuration in which `stage` of a run is trained again; what is not trained again cannot be changed."""
    before = replace(configured(run), device="auto")
    after = configure_from(before, flags)
    belongs = {"extractor": "extractor", "fedsc": "extractor", "experts": "experts", "gate": "gate"}
    for section in ("seed", "threads", "data", *belongs):
        if belongs.get(section) not in STAGES[STAGES.index(stage) :]:
            old, new = ({section: to_plain(getattr(config, section))} for config in (before, after))
            changed = difference(old, new)
            if changed:
                raise ConfigError(
                    f"{changed}, which `{stage}` keeps as it is; `nmoe-train {belongs.get(section, 'run')}` changes it"
                )
    return after


def fleet_of(run: Run) -> tuple[Trainer, Checkpoint]:
    """A finished run's clients and networks, and its states as a training would have them."""
    config = replace(configured(run), device="auto")
    dataset = load(config.data.name)
    fleet = Trainer(config, dataset, deal(dataset, config.data, config.seed), _device(config))
    return fleet, fleet.begun(Checkpoint(to_plain(config)), (run, "evaluate"))


def _finished(out: Path) -> bool:
    """Whether a run is there whose checkpoint had no time to go."""
    return (out / RUN_FILE).exists() and (partial(out) / NAME).exists()


def _refuse_finished(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise RunError(f"{out}: holds a finished run; choose another --out")


def _begin(config: Config, out: Path, path: Path, resume: bool, command: str) -> Checkpoint:
    _refuse_finished(out)
    if out.resolve() in (Path.cwd().resolve(), *Path.cwd().resolve().parents):
        raise RunError(f"{out}: the current folder would be replaced; choose another place")
    try:
        check_replaceable(out, RUN_FILE, FILES)
    except (OSError, ValueError) as error:
        raise RunError(f"{out}: {error}") from error
    plain = to_plain(config)
    if not resume:
        if path.exists():
            raise RunError(f"{path.parent}: a training stopped there; go on with --resume, or remove it")
        return Checkpoint(plain, command=command)
    checkpoint = Checkpoint.read(path)
    if checkpoint.command != command:
        raise RunError(f"{path.parent}: begun by `nmoe-train {checkpoint.command}`; go on with that")
    differs = difference(checkpoint.config, plain)
    if differs:
        raise RunError(f"{path}: cannot go on with other settings: {differs}")
    return checkpoint


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def surroundings(threads: int) -> Iterator[None]:
    """What a training changes of the process, and puts back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)
