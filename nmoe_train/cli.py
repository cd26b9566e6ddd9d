"""`nmoe-train`: what is done where the models are trained. Commands parse, call one library function, print."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_train.errors import ConfigError, RunError, TrainError
from nmoe_train.terminal import Progress, devices, json_line, summary
from nmoe_train.terminal import table as table_of

if TYPE_CHECKING:
    from nmoe_train.config import Config
    from nmoe_train.run import Run

PATH = click.Path(path_type=Path)


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a networked mixture of experts, federally."""


def _options(*given: Callable[..., Any]) -> Callable[..., Any]:
    """Several options at once, shown in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            command = option(command)
        return command

    return add


_SET = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, as --set gate.rate=0.1; see `settings`."
)
_DEVICE = click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), help="What trains.  [default: auto]")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print every round and the result as JSON, one a line.")
_RESUME = click.option("--resume", is_flag=True, help="Go on with the training that stopped at --out.")
_RUN = click.argument("folder", type=PATH, metavar="RUN")
_GATE = click.option("--gate", type=click.Choice(("rangate", "rollgate", "fedgate")), help="[default: fedgate]")
_TOP_K = click.option("--top-k", type=int, help="Experts a row is sent to.  [default: 1]")
_EXTRACTOR = click.option("--extractor", type=click.Choice(("fedce", "fedsc")), help="[default: fedce]")
_ROUNDS = click.option("--rounds", type=int, help="Of the extractor.  [default: 20]")
_EPSILON = click.option(
    "--dp-epsilon",
    type=float,
    help="FedSC: privacy budget of the matrices, which chooses their noise.",
)
_BACKBONE = click.option("--backbone", help="small, resnet18 or package.module:factory.  [default: small]")

_PLACES = {
    "data": "data.name",
    "clients": "data.clients",
    "partition": "data.partition",
    "extractor": "extractor.method",
    "backbone": "extractor.backbone",
    "rounds": "extractor.rounds",
    "dp_epsilon": "fedsc.epsilon",
    "gate": "gate.method",
    "top_k": "inference.top_k",
}
"""Where an option stands in the configuration, unless by its own name."""

_SPLIT = _options(
    click.option(
        "--config", "file", type=PATH, help="A TOML file of settings, or a run.json whose settings are taken."
    ),
    click.option("--recipe", type=click.Choice(("best", "paper")), help="Named settings.  [default: best]"),
    click.option("--data", help="digits, cifar10, fashion-mnist, npz:FILE or folder:DIR.  [default: digits]"),
    click.option("--clients", type=int, help="How many devices.  [default: 10]"),
    click.option(
        "--partition",
        help="iid, noniid:TAU (own class: 1/(1+TAU)), dirichlet:A, classes:C.  [default: noniid:0.2]",
    ),
    _EXTRACTOR,
    _GATE,
    _TOP_K,
    _BACKBONE,
    _ROUNDS,
    _EPSILON,
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--threads", type=int, help="CPU threads; another number changes the last bits.  [default: 1]"),
    _DEVICE,
    _SET,
)


@cli.command(
    epilog="""\b
Examples: nmoe-train run
          nmoe-train run --partition noniid:0.5 --gate rollgate --out runs/ring
          nmoe-train run --extractor fedsc --dp-epsilon 8
          nmoe-train run --data npz:cifar10.npz --rounds 100 --set extractor.batch=50
          nmoe-train run --out runs/ring --resume"""
)
@_SPLIT
@click.option("--out", type=PATH, help="The run's folder.  [default: the first free of runs/DATA-N]")
@_RESUME
@_JSON
def run(
    file: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    resume: bool,
    as_json: bool,
    **given: object,
) -> None:
    """Train extractor, experts and gate, and write the run.

    A recipe overrides the defaults, a file the recipe, and options override the file.

    With no option at all this trains ten clients on scikit-learn's digits in seconds; nothing is downloaded. Every
    round leaves a checkpoint: what was stopped or killed goes on with --resume to the same numbers.
    """
    from nmoe_train.config import configure
    from nmoe_train.pipeline import stopped_config

    flags = _flags(given, settings)
    if resume and out is None:
        raise ConfigError("--resume needs --out: the folder of the training that stopped")
    # Without any setting, a resumed training keeps its own.
    untouched = resume and not flags and file is None and recipe is None
    config = stopped_config(out) if untouched and out is not None else configure(recipe or "best", file, flags)
    _train(config, out, resume, as_json, name=config.data.name.partition(":")[0])


def _again(stage: str, *options: Callable[..., Any]) -> Callable[..., Any]:
    """A command that trains a stage of a run again."""
    example = {"extractor": " --rounds 40", "experts": " --set experts.epochs=10", "gate": " --gate rollgate"}
    help_ = {
        "extractor": "Train RUN's extractor again with other settings, and experts and gate on it; the split is kept.",
        "experts": "Train RUN's experts again with other settings, and a gate for them; the extractor is kept.",
        "gate": "Train RUN's gate again with other settings; extractor and experts are kept.",
        "evaluate": "Measure RUN again, as devices of other inference settings would run it; all networks are kept.",
    }[stage]

    @click.command(name=stage, help=help_, epilog=f"Example: nmoe-train {stage} runs/digits-1{example.get(stage, '')}")
    @_options(_RUN, *options, _DEVICE, _SET)
    @click.option("--out", type=PATH, help=f"The new run's folder.  [default: the first free of RUN-{stage}-N]")
    @_RESUME
    @_JSON
    def command(
        folder: Path, settings: tuple[str, ...], out: Path | None, resume: bool, as_json: bool, **given: object
    ) -> None:
        from nmoe_train.pipeline import retrained, stopped_config
        from nmoe_train.run import read_run

        folder, flags = _named(folder), _flags(given, settings)
        kept = read_run(folder)
        if resume and out is None:
            raise ConfigError("--resume needs --out: the folder of the training that stopped")
        # Without any setting, a resumed training keeps its own.
        untouched = resume and not flags and out is not None
        config = stopped_config(out) if untouched else retrained(kept, stage, flags)
        _train(config, out, resume, as_json, name=f"{folder.name}-{stage}", parent=folder.parent, again=(kept, stage))

    return command


for _command in (
    _again("extractor", _EXTRACTOR, _BACKBONE, _ROUNDS, _EPSILON),
    _again("experts"),
    _again("gate", _GATE, _TOP_K),
    _again("evaluate", _TOP_K),
):
    cli.add_command(_command)


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
    from nmoe_train.checkpoint import NAME, partial
    from nmoe_train.pipeline import train

    folder = out or _free_folder(parent, name)
    try:
        done = train(config, folder, resume=resume, again=again, progress=json_line if as_json else Progress())
    except KeyboardInterrupt:
        if not (partial(folder) / NAME).exists():
            raise RunError("stopped before there was anything to keep") from None
        command = click.get_current_context().command_path + (f" {again[0].folder}" if again else "")
        raise RunError(f"stopped; go on with: {command} --out {folder} --resume") from None
    if as_json:
        click.echo(json.dumps({"run": str(folder), "metrics": {k: done.metrics[k] for k in ("own", "iid", "bytes")}}))
        return
    click.echo(summary(done.metrics))
    click.echo(f"{folder}: {devices(done.record.experts)}; look at {folder}/report.html; next: nmoe-export {folder}")


def _flags(given: Mapping[str, object], settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options that were given, where they stand in the configuration."""
    from nmoe_train.settings import parsed

    flags: dict[str, Any] = {}
    for place, value in [parsed(text) for text in settings] + [(_PLACES.get(k, k), v) for k, v in given.items()]:
        if value is not None:
            *sections, name = place.split(".")
            table = flags
            for section in sections:
                table = table.setdefault(section, {})
            table[name] = value
    return flags


def _named(folder: Path) -> Path:
    """A folder by a name of its own: `.` has none."""
    return folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))


def _free_folder(parent: Path, name: str) -> Path:
    """The first free place for a run, claimed by making the folder of its checkpoint."""
    for number in itertools.count(1):
        path = parent / f"{name}-{number}"
        try:
            if not path.exists():
                path.with_name(path.name + ".partial").mkdir(parents=True)
                return path
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}; choose a place with --out") from error
    raise AssertionError


@cli.command(epilog="Example: nmoe-train baselines runs/digits-1")
@_RUN
@_JSON
def baselines(folder: Path, as_json: bool) -> None:
    """Train what RUN is to be compared with, on the same split: local classifiers, FedAvg's, a centralised mixture.

    What is measured stands in RUN/baselines.json and in its report.html. A second call goes on where the first stopped.
    """
    from nmoe_train.results.baselines import baselines
    from nmoe_train.run import read_run

    run = read_run(_named(folder))
    try:
        found = baselines(run, json_line if as_json else Progress())
    except KeyboardInterrupt:
        raise RunError(f"stopped; go on with: nmoe-train baselines {folder}") from None
    if as_json:
        click.echo(json.dumps(found))
        return
    names = {"local": "local classifiers", "fedavg": "FedAvg classifier", "centralised": "centralised mixture"}
    lines = [(name, *(found[key][part]["accuracy"] for part in ("own", "iid"))) for key, name in names.items()]
    click.echo(
        "\n".join([*table_of(run.metrics), *(f"{name:<24}{own:>18.1%}{iid:>10.1%}" for name, own, iid in lines)])
    )
    click.echo(f"look at {folder}/report.html")


_PAPER = _options(
    click.option("--data", help="digits, cifar10, npz:FILE …  [default: digits]"),
    click.option(
        "--recipe", type=click.Choice(("best", "paper")), default="paper", show_default=True, help="Named settings."
    ),
    _BACKBONE,
    _DEVICE,
    _SET,
    click.option("--minutes", type=float, help="Stop after so many; the next call goes on."),
    click.option("--out", type=PATH, help="Where the runs and paper.json are kept.  [default: paper/DATA]"),
)


@cli.command(
    epilog="""\b
Examples: nmoe-train table 1
          nmoe-train table 2 --seeds 3
          nmoe-train table 1 --data cifar10 --backbone resnet18 --set extractor.dim=512 --device cuda --minutes 10"""
)
@click.argument("number", type=click.IntRange(1, 2))
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Trainings a cell is the mean of."
)
@_PAPER
def table(number: int, seeds: int, minutes: float | None, **given: Any) -> None:
    """The paper's table NUMBER: every extractor with every gate, and what they are compared with, over four splits.

    Table 1 is each client's own distribution, table 2 the balanced test; a cell is accuracy/macro F1/AUC in percent.
    Both share their trainings, which are kept: what was stopped goes on, and what is there is not trained again.
    """
    from nmoe_train.results.paper import PARTITIONS, table, units

    done, left = _worked(units(PARTITIONS, seeds), minutes, given)
    click.echo(table(number, done, seeds))
    if left:
        click.echo(left)


@cli.command(epilog="Example: nmoe-train figure 3")
@click.argument("number", type=click.IntRange(3, 4))
@_PAPER
def figure(number: int, minutes: float | None, **given: Any) -> None:
    """The paper's figure NUMBER as a page: who asks whom (3), or how it learned (4), at noniid:0.5.

    It is drawn from the same trainings as the tables.
    """
    from nmoe_train.results.paper import FIGURE_PARTITION, draw, units

    due = [unit for unit in units([FIGURE_PARTITION], 1) if unit.kind in ("fedgate", "baselines")]
    done, left = _worked(due, minutes, given)
    click.echo(left or f"look at {draw(_place(given), number, done)}")


def _place(given: Mapping[str, Any]) -> Path:
    return given["out"] or Path("paper") / Path((given["data"] or "digits").rpartition(":")[2]).stem


def _worked(due: list[Any], minutes: float | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What is there after so many minutes, and a line on what is not."""
    from nmoe_train.results.paper import FILE, work

    flags = _flags({key: given[key] for key in ("data", "backbone", "device")}, given["settings"])
    out = _place(given)
    try:
        done = work(out, given["recipe"], flags, due, Progress(), minutes, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        raise RunError(f"stopped; what is done is kept in {out / FILE}; call it again to go on") from None
    count = sum(unit.name in done for unit in due)
    left = f"{count} of {len(due)} parts are done and kept in {out / FILE}; call it again to go on"
    return done, "" if count == len(due) else left


@cli.command(epilog="Example: nmoe-train settings --recipe paper --data cifar10 > mine.toml")
@_SPLIT
def settings(file: Path | None, recipe: str | None, settings: tuple[str, ...], **given: object) -> None:
    """Print every setting as TOML, as `run` with the same options would have it: a file for --config."""
    from nmoe_train.config import configure
    from nmoe_train.settings import as_toml

    click.echo(as_toml(configure(recipe or "best", file, _flags(given, settings))), nl=False)


@cli.command(epilog="Example: nmoe-train inspect runs/digits-1")
@_RUN
@click.option("--json", "as_json", is_flag=True, help="Print run.json and the metrics as one JSON object.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify RUN, rebuild its networks from their weights, and say what is in it.

    The networks are built by the factories that run.json names: look into a run only when you trust where it is from.
    """
    from nmoe_edge.common.schema import to_plain
    from nmoe_train.run import read_run

    run = read_run(folder)
    record = run.record
    networks = {"extractor": [run.extractor()]}
    networks["gate"] = [run.gate(device) for device in range(record.experts if record.personal_gates else 1)]
    networks["expert"] = [run.expert(device) for device in range(record.experts)]
    if record.networks.head is not None:
        networks["head"] = [run.head(0)]
    if as_json:
        click.echo(json.dumps({"run": to_plain(record), "metrics": run.metrics}, indent=2))
        return
    click.echo(f"data       {record.data.name}, {record.data.samples:,} samples of {list(record.data.shape)}")
    for role, nets in networks.items():
        parameters = sum(p.numel() for p in nets[0].parameters())
        click.echo(f"{role:<10} {getattr(record.networks, role).factory}, {parameters:,} parameters")
    for part, name in (("own", "own distribution"), ("iid", "balanced")):
        figures = run.metrics.get(part, {}).get("networked")
        if figures:
            click.echo(f"{'accuracy':<10} {figures['accuracy']:.1%} networked, {name}")
    gates = "one gate each" if record.personal_gates else "one gate for all"
    click.echo(f"devices    {record.experts}, {gates}, latents of {record.latent_dim} numbers")
    click.echo(f"trained    seed {record.seed}, with torch {record.versions.get('torch', 'of an unknown version')}")
    click.echo("verified: every file is as run.json says, and every network takes its weights")


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-train", TrainError, "train", ("torch", "torchvision", "safetensors", "sklearn", "PIL"))
