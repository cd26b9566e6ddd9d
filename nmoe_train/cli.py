"""`nmoe-train`: what is done where the models are trained. Commands parse, call one library function, print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nmoe_edge.program import EXIT_STATUS, SETTINGS, run_program
from nmoe_train.errors import TrainError


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a networked mixture of experts, federally."""


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
    click.echo(f"trained    seed {record.seed}, with torch {record.versions['torch']}")
    click.echo("verified: every file is as run.json says, and every network takes its weights")


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-train", TrainError, "train", ("torch", "torchvision", "safetensors", "sklearn"))
