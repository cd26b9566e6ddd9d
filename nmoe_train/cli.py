"""`nmoe-train`: the commands. Each one parses its options, calls one library function and prints the result."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_edge.common.text import counted
from nmoe_train import options
from nmoe_train.errors import ConfigError, RunError, TrainError
from nmoe_train.results.pages.formats import BASELINES
from nmoe_train.results.paper.commands import figure as paper_figure
from nmoe_train.results.paper.commands import table as paper_table
from nmoe_train.terminal import Progress, json_line, summary
from nmoe_train.terminal import table as accuracy_table

if TYPE_CHECKING:
    from nmoe_train.config import Config
    from nmoe_train.run import Run


@click.group(
    context_settings=SETTINGS,
    epilog=f"""\b
Start with:
  nmoe-train run                      train ten clients on digits, in seconds
  nmoe-train baselines runs/digits-1  train what the run is compared with
  nmoe-export runs/digits-1           turn the run into bundles for devices

{EXIT_STATUS}""",
)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a networked mixture of experts on clients that keep their data (federated learning).

    Every client becomes a device with its own expert. All devices share one feature extractor, and a gate picks the
    experts that answer a row.
    """


@cli.command(
    short_help="Train extractor, experts and gate, and write a run.",
    epilog="""\b
Examples: nmoe-train run
          nmoe-train run --partition noniid:0.5 --gate rollgate --out runs/ring
          nmoe-train run --extractor fedsc --dp-epsilon 8
          nmoe-train run --data npz:cifar10.npz --rounds 100 --set extractor.batch=50
          nmoe-train run --out runs/ring --resume""",
)
@options.TRAINING
@click.option("--out", type=options.PATH, help="The run's folder.  [default: the first free of runs/DATA-N]")
@options.RESUME
@options.JSON
def run(
    file: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    resume: bool,
    as_json: bool,
    **given: object,
) -> None:
    """Train extractor, experts and gate, evaluate them, and write a run: the folder that nmoe-export reads.

    Without options, this trains ten clients on scikit-learn's digits in seconds; nothing is downloaded.

    A recipe overrides the defaults, --config overrides the recipe, and the other options override the file.

    A checkpoint is saved after every round. If the training stops or is killed, finish it with --out and --resume: the
    result is the same as without the interruption.
    """
    from nmoe_train.pipeline import stopped_config
    from nmoe_train.recipes import configure

    flags = options.settings_of(given, settings)
    _check_resume(resume, out)
    keeps_settings = resume and not flags and file is None and recipe is None
    config = stopped_config(out) if keeps_settings and out is not None else configure(recipe or "best", file, flags)
    _train(config, out, resume, as_json, name=config.data.name.partition(":")[0])


def _stage_command(
    stage: str, short_help: str, kept: str, example: str, *own_options: Callable[..., Any]
) -> click.Command:
    """A command that trains a run again from `stage` on."""
    full_help = f"{short_help}\n\nRUN is the folder of a finished run, which is not changed. {kept}"

    @click.command(
        name=stage, help=full_help, short_help=short_help, epilog=f"Example: nmoe-train {stage} runs/digits-1{example}"
    )
    @options.combine(options.RUN, *own_options, options.DEVICE, options.SET)
    @click.option("--out", type=options.PATH, help=f"The new run's folder.  [default: the first free of RUN-{stage}-N]")
    @options.RESUME
    @options.JSON
    def command(
        folder: Path, settings: tuple[str, ...], out: Path | None, resume: bool, as_json: bool, **given: object
    ) -> None:
        from nmoe_train.pipeline import retrain_config, stopped_config
        from nmoe_train.run import read_run

        folder = _with_name(folder)
        flags = options.settings_of(given, settings)
        run = read_run(folder)
        _check_resume(resume, out)
        keeps_settings = resume and not flags
        config = stopped_config(out) if keeps_settings and out is not None else retrain_config(run, stage, flags)
        _train(config, out, resume, as_json, name=f"{folder.name}-{stage}", parent=folder.parent, again=(run, stage))

    return command


_AS_IN_RUN = "as in RUN"
cli.add_command(
    _stage_command(
        "extractor",
        "Train a new extractor, experts and gate from RUN.",
        "The new run has its data and split, and its settings unless options change them.",
        " --rounds 40",
        options.extractor(_AS_IN_RUN, _AS_IN_RUN, _AS_IN_RUN, _AS_IN_RUN),
    )
)
cli.add_command(
    _stage_command(
        "experts",
        "Train new experts and a gate for the extractor of RUN.",
        "The new run has its extractor, and its settings unless options change them.",
        " --set experts.epochs=10",
    )
)
cli.add_command(
    _stage_command(
        "gate",
        "Train a new gate for the extractor and experts of RUN.",
        "The new run has its extractor and experts, and its settings unless options change them.",
        " --gate rollgate",
        options.gate(_AS_IN_RUN),
        options.top_k(_AS_IN_RUN),
    )
)
cli.add_command(
    _stage_command(
        "evaluate",
        "Evaluate RUN under other inference settings.",
        "The new run has the same networks; only inference settings and figures differ.",
        " --top-k 2",
        options.top_k(_AS_IN_RUN),
    )
)


def _check_resume(resume: bool, out: Path | None) -> None:
    if resume and out is None:
        raise ConfigError("--resume needs --out: the folder of the training that stopped")


def _train(
    config: Config,
    out: Path | None,
    resume: bool,
    as_json: bool,
    *,
    name: str,
    parent: Path = Path("runs"),
    again: tuple[Run, str] | None = None,
) -> None:
    """Train into `out`, or into the first free folder <parent>/<name>-N, and print the result."""
    from nmoe_train.checkpoint import CHECKPOINT_FILE, partial_folder
    from nmoe_train.pipeline import train

    folder = out or _free_folder(parent, name)
    try:
        done = train(config, folder, resume=resume, again=again, progress=json_line if as_json else Progress())
    except KeyboardInterrupt:
        if not (partial_folder(folder) / CHECKPOINT_FILE).exists():
            raise RunError("stopped before the first checkpoint; nothing is saved") from None
        command = click.get_current_context().command_path + (f" {again[0].folder}" if again else "")
        raise RunError(f"stopped; finish it with: {command} --out {folder} --resume") from None
    if as_json:
        shown = {key: done.metrics[key] for key in ("own", "iid", "bytes")}
        click.echo(json.dumps({"run": str(folder), "metrics": shown}))
        return
    click.echo(summary(done.metrics))
    devices = counted(done.record.experts, "device")
    click.echo(f"{folder}: {devices}; report: {folder}/report.html; next: nmoe-export {folder}")


def _with_name(folder: Path) -> Path:
    """`folder` in a form that has a name: `.` and `..` become absolute."""
    return folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))


def _free_folder(parent: Path, name: str) -> Path:
    """The first free folder <parent>/<name>-N, reserved by making its checkpoint's folder."""
    for number in itertools.count(1):
        path = parent / f"{name}-{number}"
        try:
            if not path.exists():
                path.with_name(path.name + ".partial").mkdir(parents=True)
                return path
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; choose another folder with --out") from error
    raise AssertionError("unreachable: itertools.count does not end")


@cli.command(
    short_help="Train baselines to compare RUN with.",
    epilog="""\b
Examples: nmoe-train baselines runs/digits-1
          nmoe-train baselines runs/digits-1 --only fedavg_tuned --only ditto""",
)
@options.RUN
@click.option(
    "--only",
    "methods",
    type=click.Choice(BASELINES),
    multiple=True,
    help="Train this baseline. May be repeated.  [default: all]",
)
@options.JSON
def baselines(folder: Path, methods: tuple[str, ...], as_json: bool) -> None:
    """Train baselines to compare RUN with, on the same data, split and network.

    Baselines are a separate classifier for each client, one classifier averaged over all clients (FedAvg), and a
    mixture of experts trained on all data in one place. The others give every client a model of its own: FedAvg with
    the client's class mix or after fine-tuning, FedRep, Ditto, and a linear classifier from class means (LDA). Held-out
    samples choose their settings.

    RUN is the folder of a finished run; the figures go to its baselines.json and report.html. If the command stops, run
    it again to finish.
    """
    from nmoe_train.results.baselines import baselines
    from nmoe_train.run import read_run

    run = read_run(_with_name(folder))
    try:
        found = baselines(run, json_line if as_json else Progress(), methods or BASELINES)
    except KeyboardInterrupt:
        raise RunError(f"stopped; finish it with: nmoe-train baselines {folder}") from None
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(accuracy_table(run.metrics, found))
    click.echo(f"report: {folder}/report.html")


cli.add_command(paper_table)
cli.add_command(paper_figure)


@cli.command(
    short_help="Print every setting as TOML.",
    epilog="Example: nmoe-train settings --recipe paper --data cifar10 > mine.toml",
)
@options.TRAINING
def settings(file: Path | None, recipe: str | None, settings: tuple[str, ...], **given: object) -> None:
    """Print every setting and what it means, with the value that `nmoe-train run` with the same options would use.

    The output is TOML: edit it, and pass it to `nmoe-train run --config`.
    """
    from nmoe_train.recipes import configure
    from nmoe_train.settings import as_toml

    click.echo(as_toml(configure(recipe or "best", file, options.settings_of(given, settings))), nl=False)


@cli.command(short_help="Verify RUN and print what it contains.", epilog="Example: nmoe-train inspect runs/digits-1")
@options.RUN
@click.option("--json", "as_json", is_flag=True, help="Print run.json and metrics.json as one JSON object.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify every file of RUN, rebuild its networks, and print what it contains.

    RUN is the folder of a finished run. It can name any importable Python function to build its networks, and this
    command calls that function: inspect only runs that you trust.
    """
    from nmoe_edge.common.schema import to_plain
    from nmoe_train.run import read_run

    run = read_run(folder)
    record = run.record
    devices = range(record.experts)
    networks = {"extractor": [run.extractor()]}
    networks["gate"] = [run.gate(device) for device in (devices if record.personal_gates else [0])]
    networks["expert"] = [run.expert(device) for device in devices]
    if record.networks.head is not None:
        networks["head"] = [run.head(0)]
    if as_json:
        click.echo(json.dumps({"run": to_plain(record), "metrics": run.metrics}, indent=2))
        return
    click.echo(f"data       {record.data.name}, {record.data.samples:,} samples of shape {list(record.data.shape)}")
    for role, nets in networks.items():
        parameters = sum(p.numel() for p in nets[0].parameters())
        click.echo(f"{role:<10} {getattr(record.networks, role).factory}, {parameters:,} parameters")
    for part, name in (("own", "own distribution"), ("iid", "balanced")):
        figures = run.metrics.get(part, {}).get("networked")
        if figures:
            click.echo(f"{'accuracy':<10} {figures['accuracy']:.1%} networked, {name}")
    gates = "each with its own gate" if record.personal_gates else "with one shared gate"
    click.echo(f"devices    {record.experts}, {gates}, latents of {record.latent_dim} numbers")
    click.echo(f"trained    seed {record.seed}, with torch {record.versions.get('torch', 'of an unknown version')}")
    click.echo("verified   every file matches run.json, and every network loads its weights")


_PACKAGES = ("torch", "torchvision", "safetensors", "sklearn", "PIL", "matplotlib")
"""Packages that commands import when they need them; the extra `train` installs them."""


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-train", TrainError, "train", _PACKAGES)
