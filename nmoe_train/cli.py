"""`nmoe-train`: what is done where the models are trained. Commands parse, call one library function, print."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nmoe_edge.program import EXIT_STATUS, SETTINGS, run_program
from nmoe_train.errors import ConfigError, RunError, TrainError


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a networked mixture of experts, federally."""


@cli.command(
    epilog="""\b
Examples: nmoe-train run
          nmoe-train run --partition noniid:0.5 --gate rollgate --out runs/ring
          nmoe-train run --data npz:cifar10.npz --rounds 100 --seed 1
          nmoe-train run --out runs/ring --resume"""
)
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="A TOML file of settings, like run.json's config."
)
@click.option(
    "--recipe", type=click.Choice(("best", "paper")), default="best", show_default=True, help="Named settings."
)
@click.option("--data", help="digits, cifar10, fashion-mnist or npz:FILE.  [default: digits]")
@click.option("--clients", type=int, help="How many devices.  [default: 10]")
@click.option("--partition", help="iid, noniid:TAU, dirichlet:A or classes:C.  [default: noniid:0.2]")
@click.option("--gate", type=click.Choice(("rangate", "rollgate", "fedgate")), help="[default: fedgate]")
@click.option("--top-k", type=int, help="Experts a row is sent to.  [default: 1]")
@click.option("--backbone", help="small, resnet18 or package.module:factory.  [default: small]")
@click.option("--rounds", type=int, help="Of the extractor.  [default: 20]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--threads", type=int, help="CPU threads; another number changes the last bits.  [default: 1]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The run's folder.  [default: the first free of runs/DATA-N]"
)
@click.option("--resume", is_flag=True, help="Go on with the training that stopped at --out.")
def run(file: Path | None, recipe: str, out: Path | None, resume: bool, **given: object) -> None:
    """Train extractor, experts and gate, and write the run.

    With no option at all this trains ten clients on scikit-learn's digits in seconds; nothing is downloaded. Every
    round leaves a checkpoint: what was stopped or killed goes on with --resume to the same numbers.
    """
    from nmoe_train.config import configure
    from nmoe_train.pipeline import stopped_config, train

    flags = _flags(given)
    if resume and out is None:
        raise ConfigError("--resume needs --out: the folder of the training that stopped")
    # Without any setting, a resumed training keeps its own.
    untouched = resume and not flags and file is None and recipe == "best"
    config = stopped_config(out) if untouched and out is not None else configure(recipe, file, flags)
    folder = out or _free_folder(config.data.name.partition(":")[0])
    try:
        done = train(config, folder, resume=resume, progress=Progress())
    except KeyboardInterrupt:
        raise RunError(f"stopped; go on with: nmoe-train run --out {folder} --resume") from None
    click.echo(_summary(done.metrics))
    click.echo(f"{folder}: {done.record.experts} devices; next: nmoe-export {folder}")


_PLACES = {"top_k": ("inference", "top_k"), "backbone": ("extractor", "backbone"), "rounds": ("extractor", "rounds")}
_PLACES |= {key: ("data", key) for key in ("clients", "partition")} | {
    "data": ("data", "name"),
    "gate": ("gate", "method"),
}


def _flags(given: dict[str, object]) -> dict[str, Any]:
    """The options that were given, where they stand in the configuration."""
    flags: dict[str, Any] = {}
    for key, value in given.items():
        if value is not None:
            section, name = _PLACES.get(key, ("", key))
            (flags.setdefault(section, {}) if section else flags)[name] = value
    return flags


def _free_folder(name: str) -> Path:
    numbers = (Path("runs") / f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in numbers if not path.exists() and not path.with_name(path.name + ".partial").exists())


class Progress:
    """Where a training stands, on stderr: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        """The clock starts now."""
        self._stage, self._began, self._said = "", time.monotonic(), 0.0

    def __call__(self, stage: str, done: int, rounds: int, loss: float) -> None:
        """After each round."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        left = (now - self._began) / max(1, done - self._first) * (rounds - done)
        line = f"{stage:<9} {done:>4}/{rounds}  loss {loss:.3f}" + (
            f"  {left:.0f} s left" if done > self._first else ""
        )
        terminal, last = sys.stderr.isatty(), done == rounds
        if terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=last)
        elif last or now - self._said > 5:
            click.echo(line, err=True)
            self._said = now


def _summary(metrics: Mapping[str, Any]) -> str:
    lines = [f"{'':<24}{'own distribution':>18}{'balanced':>10}"]
    for key, name in (("networked", "networked"), ("own_expert", "own expert alone"), ("fedavg", "FedAvg classifier")):
        own, iid = (metrics[part][key]["accuracy"] for part in ("own", "iid"))
        lines.append(f"{name:<24}{own:>18.1%}{iid:>10.1%}")
    asked = [1 - metrics[part]["kept_local"] for part in ("own", "iid")]
    lines.append(
        f"{asked[0]:.1%} of the rows of a device's own mix asked another device, {asked[1]:.1%} of the balanced ones"
    )
    return "\n".join(lines)


@cli.command(epilog="Example: nmoe-train inspect runs/digits")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print run.json and the metrics as one JSON object.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify RUN, rebuild its networks from their weights, and say what is in it.

    The networks are built by the factories that run.json names: look into a run only when you trust where it is from.
    """
    from nmoe_edge.schema import to_plain
    from nmoe_train.run import read_run

    run = read_run(folder)
    record = run.record
    networks = {"extractor": [run.extractor()]}
    networks["gate"] = [run.gate(device) for device in range(record.experts if record.personal_gates else 1)]
    networks["expert"] = [run.expert(device) for device in range(record.experts)]
    if as_json:
        click.echo(json.dumps({"run": to_plain(record), "metrics": run.metrics}, indent=2))
        return
    click.echo(f"data       {record.data.name}, {record.data.samples:,} samples of {list(record.data.shape)}")
    for role, nets in networks.items():
        parameters = sum(p.numel() for p in nets[0].parameters())
        click.echo(f"{role:<10} {getattr(record.networks, role).factory}, {parameters:,} parameters")
    gates = "one gate each" if record.personal_gates else "one gate for all"
    click.echo(f"devices    {record.experts}, {gates}, latents of {record.latent_dim} numbers")
    click.echo(f"trained    seed {record.seed}, with torch {record.versions.get('torch', 'of an unknown version')}")
    click.echo("verified: every file is as run.json says, and every network takes its weights")


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-train", TrainError, "train", ("torch", "torchvision", "safetensors", "sklearn"))
