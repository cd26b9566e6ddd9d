"""A whole training: data -> extractor -> experts -> gate -> evaluation -> run.

A checkpoint is written after every round, and all randomness comes from (seed, stage, round, client). A training that
is killed at any moment therefore resumes to the same numbers. A stage of a finished run can be trained again with other
settings: earlier stages are taken from the run, later ones are trained again too.

The stages themselves are in trainer.py and the evaluation is in assessment.py; this module handles folders, checkpoints
and the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nmoe_edge.common.folders import check_replaceable
from nmoe_edge.common.schema import from_plain, to_plain
from nmoe_train.assessment import Assessment, assess
from nmoe_train.checkpoint import CHECKPOINT_FILE, Checkpoint, claim_folder, difference, partial_folder
from nmoe_train.config import Config
from nmoe_train.data.clients import Clients, Part, assign_samples
from nmoe_train.data.datasets import Dataset, load
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.meter import StageMeter
from nmoe_train.recipes import configure_from
from nmoe_train.results.pages.run_page import page
from nmoe_train.results.resources import client_seconds, resources_of
from nmoe_train.run import FILES, RUN_FILE, Run, read_run, write_run
from nmoe_train.stages.gate import plain_gate
from nmoe_train.stages.statgate import gate_of
from nmoe_train.stages.statistics import Statistics, client_statistics, from_state
from nmoe_train.trainer import STAGES, STATISTICS, Progress, Trainer, encode

STAGE_OF_SECTION = {"extractor": "extractor", "fedsc": "extractor", "experts": "experts", "gate": "gate"}
"""The stage that a section of the configuration belongs to. Other sections belong to no single stage."""


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    again: tuple[Run, str] | None = None,
    progress: Progress = lambda _: None,
) -> Run:
    """Train all stages, evaluate the fleet, write the run to the folder `out`, and return it.

    While the training runs, its checkpoint is in `<out>.partial`. If it is interrupted, call `train` again with the
    same arguments and `resume=True`; the result is the same, bit for bit.

    config: every setting; Config() trains ten clients on scikit-learn's digits in seconds
    out: the run's folder; it must not exist, or be empty
    resume: continue the training that stopped at `out`; settings and data must be the same
    again: a finished run, and the stage to train again ("extractor", "experts", "gate" or "evaluate"). Earlier stages
        are copied from the run. Make `config` with retrain_config(run, stage, changes)
    progress: called with a Round after every round. An exception that it raises stops the training and leaves the
        checkpoint

    Raises TrainError: ConfigError for impossible settings, DataError for missing or unsuitable data, NetError for a
    backbone that cannot be built, DivergedError when a loss becomes infinite or NaN, RunError when `out` cannot be
    used, is being trained by another process, or has nothing to resume.

    Example::

        run = train(Config(), "runs/digits", progress=print)
        print(run.metrics["own"]["networked"]["accuracy"])      # a share in 0..1
    """
    out = Path(out)
    if again is not None:
        _check_stage(again[1])
    command = again[1] if again is not None else "run"
    device = _device(config)
    config = replace(config, device=device.type)  # the device affects the numbers, so the run records which one it was
    with claim_folder(out) as checkpoint_path, torch_settings(config.threads):
        if resume and _is_written(out):
            checkpoint_path.unlink()
            return read_run(out)
        checkpoint = _begin_or_resume(config, out, checkpoint_path, resume, command)
        dataset, clients = _load_and_split(config)
        if checkpoint.fingerprint not in ("", clients.fingerprint):
            raise RunError(
                f"{checkpoint_path}: cannot be resumed: the data has changed since the training began;"
                " restore it, or choose another --out"
            )
        trainer = Trainer(config, dataset, clients, device)
        if not checkpoint.states:
            checkpoint = trainer.initial_checkpoint(checkpoint, again)
            checkpoint.write(checkpoint_path)
        checkpoint = trainer.train_stages(checkpoint, lambda c: c.write(checkpoint_path), progress)
        run = _write(out, trainer, checkpoint, *_assess(trainer, checkpoint))
        checkpoint_path.unlink()
        return run


def stopped_config(out: Path) -> Config:
    """The configuration of the training that stopped at `out`, or of the run that it has already written there."""
    if os.path.isfile(out / RUN_FILE):
        return config_of(read_run(out))
    path = partial_folder(out) / CHECKPOINT_FILE
    try:
        return from_plain(Config, Checkpoint.read(path).config)
    except ValueError as error:
        raise RunError(f"{path}: another version of nmoe wrote its settings: {error}") from error


def config_of(run: Run) -> Config:
    """The configuration of a finished run."""
    plain = dict(run.record.config)
    if run.record.schema == 1 and run.record.answers_carry_prior:
        # Runs of schema 1 have no such setting. Recipe "paper" stays what it was.
        plain["inference"] = {"calibrate": False, **plain.get("inference", {})}
    try:
        return from_plain(Config, plain)
    except ValueError as error:
        raise RunError(f"{run.folder}: another version of nmoe wrote its settings: {error}") from error


def retrain_config(run: Run, stage: str, changes: Mapping[str, Any]) -> Config:
    """The configuration for training `stage` of a run again: the run's own settings with `changes`.

    changes: nested by section, such as {"gate": {"rate": 0.1}}

    Raises ConfigError when a change affects the data, the seed or a stage before `stage`, which are kept.
    """
    _check_stage(stage)
    before = replace(config_of(run), device="auto")
    after = configure_from(before, changes)
    trained = STAGES[STAGES.index(stage) :]
    for section in ("seed", "threads", "data", *STAGE_OF_SECTION):
        if STAGE_OF_SECTION.get(section) in trained:
            continue
        old = {section: to_plain(getattr(before, section))}
        new = {section: to_plain(getattr(after, section))}
        changed = difference(old, new)
        if changed:
            command = STAGE_OF_SECTION.get(section, "run")
            raise ConfigError(f"{changed}, but `nmoe-train {stage}` cannot change it; use `nmoe-train {command}`")
    return after


def trainer_of(run: Run) -> tuple[Trainer, Checkpoint]:
    """A trainer with the data and split of a finished run, and a checkpoint that holds the run's weights.

    Raises TrainError when the data is missing or has changed since the run was trained.
    """
    config = replace(config_of(run), device="auto")
    dataset, clients = _load_and_split(config)
    trainer = Trainer(config, dataset, clients, _device(config))
    return trainer, trainer.initial_checkpoint(Checkpoint(to_plain(config)), (run, "evaluate"))


def extended_gate(run: Run, newcomers: Sequence[Part]) -> tuple[nn.Module, list[Statistics]]:
    """The gate of a StatGate run for its devices and for new ones, and the statistics of all of them.

    The new devices publish theirs; every device then assembles the gate again. Experts and statistics of the run's own
    devices stay as they are.

    newcomers: of each new device, images or other inputs (n, …) and labels (n,), which statistics "moments" ignore

    Raises RunError when the run has another gate.
    """
    published = run.statistics()
    if not published:
        raise RunError(f"{run.folder}: a device can join only a gate of statistics; train it with --gate statgate")
    config = config_of(run)
    for x, y in newcomers:
        h = encode(run.extractor(), x)
        published.append(client_statistics(h, y, run.record.outputs, config.gate, config.seed, len(published)))
    temperature = 1 / float(run.gate(0).state_dict()["sharpness"])
    return gate_of(published, config.gate, temperature), published


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """Set torch's number of CPU threads, and restore it and torch's random state afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def _is_written(out: Path) -> bool:
    """Whether the run is complete and only its checkpoint remains: the process was killed between the two."""
    return (out / RUN_FILE).exists() and (partial_folder(out) / CHECKPOINT_FILE).exists()


def _begin_or_resume(config: Config, out: Path, path: Path, resume: bool, command: str) -> Checkpoint:
    """An empty checkpoint, or the one at `path`; RunError when `out` cannot be used or the checkpoint does not fit."""
    if resume and (out / RUN_FILE).exists():
        raise RunError(f"{out}: holds a finished run; there is nothing to resume")
    _check_out(out)
    plain = to_plain(config)
    if not resume:
        if path.exists():
            raise RunError(
                f"{path.parent}: holds a training that stopped; finish it with --resume, or remove the folder"
            )
        return Checkpoint(plain, command=command)
    checkpoint = Checkpoint.read(path)
    if checkpoint.command != command:
        raise RunError(
            f"{path.parent}: was started by `nmoe-train {checkpoint.command}`; resume it with the same command"
        )
    differs = difference(checkpoint.config, plain)
    if differs:
        raise RunError(
            f"{path}: cannot be resumed with other settings: {differs};"
            " use the settings that it was started with, or choose another --out"
        )
    return checkpoint


def _check_out(out: Path) -> None:
    """Refuse, before any work, a folder that the run could not replace."""
    _refuse_finished(out)
    current = Path.cwd().resolve()
    if out.resolve() in (current, *current.parents):
        raise RunError(f"{out}: the current folder would be replaced; choose another --out")
    try:
        check_replaceable(out, RUN_FILE, FILES)
    except (OSError, ValueError) as error:
        raise RunError(f"{out}: {error}") from error


def _refuse_finished(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise RunError(f"{out}: holds a finished run; choose another --out")


def _load_and_split(config: Config) -> tuple[Dataset, Clients]:
    dataset = load(config.data.name)
    return dataset, assign_samples(dataset, config.data, config.seed)


def _assess(trainer: Trainer, checkpoint: Checkpoint) -> tuple[Assessment, dict[str, Any]]:
    """The assessment of a finished training, and metrics.json."""
    meter = StageMeter(checkpoint.usage, "evaluate")
    assessment = assess(trainer, checkpoint)
    usage = meter.usage()
    seconds = {stage: measured["seconds"] for stage, measured in usage.items()}
    sizes = [len(y) for _, y in trainer.clients.train]
    resources = resources_of(trainer.config, trainer.specs, trainer.dataset.shape, sizes, checkpoint.history)
    estimated = client_seconds(resources["stages"], usage)
    timed = {"history": checkpoint.history, "seconds": seconds | {"all": sum(seconds.values())}}
    measured = {"resources": {**resources, "measured": usage, "client_seconds": estimated}}
    return assessment, assessment.metrics | timed | measured


def _write(out: Path, trainer: Trainer, checkpoint: Checkpoint, assessment: Assessment, metrics: dict[str, Any]) -> Run:
    _refuse_finished(out)  # another process may have written one meanwhile
    record = assessment.record
    gates = checkpoint.states["gate"] if record.personal_gates else checkpoint.states["gate"][:1]
    return write_run(
        out,
        record,
        extractor=trainer.classifier.extractor.state_dict(),
        heads=trainer.heads(checkpoint),
        gates=[plain_gate(gate) for gate in gates],
        experts=checkpoint.states["experts"],
        corrections=assessment.chosen.calibration,
        head_correction=assessment.chosen.head,
        familiar=assessment.familiar,
        statistics=[from_state(state) for state in checkpoint.states.get(STATISTICS, ())],
        calibration=_calibration(trainer.clients),
        metrics=metrics,
        report=page(out.name, to_plain(trainer.config), metrics, trainer.dataset.labels),
    )


def _calibration(clients: Clients) -> dict[str, np.ndarray]:
    """The held-out samples of all clients, as calibration.npz holds them."""
    sizes = [len(y) for _, y in clients.held_out]
    return {
        "inputs": torch.cat([x for x, _ in clients.held_out]).numpy(),
        "labels": torch.cat([y for _, y in clients.held_out]).numpy(),
        "clients": np.repeat(np.arange(len(sizes)), sizes),
    }
