"""`nmoe-train`: what is done where the models are trained. Commands parse, call one library function, print."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_FROM_EXTRA = ("torch", "torchvision", "safetensors", "sklearn")
"""What a command may find missing: the extra `train` brings them."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all is well; 1 it is not, and one line says why; 2 the command was misspelt.",
)
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
    import json

    from nmoe_edge.schema import to_plain
    from nmoe_train.errors import TrainError
    from nmoe_train.run import read_run

    try:
        run = read_run(folder)
        parts = {"extractor": run.extractor(), "gate": run.gate(0), "expert": run.expert(0)}
        for device in range(1, run.record.experts):
            run.gate(device)
            run.expert(device)
    except TrainError as error:
        raise click.ClickException(str(error)) from error
    record = run.record
    if as_json:
        click.echo(json.dumps({"run": to_plain(record), "metrics": run.metrics}, indent=2))
        return
    sizes = {role: sum(p.numel() for p in net.parameters()) for role, net in parts.items()}
    click.echo(f"data       {record.data.name}, {record.data.samples:,} samples of {list(record.data.shape)}")
    for role, parameters in sizes.items():
        click.echo(f"{role:<10} {getattr(record.networks, role).factory}, {parameters:,} parameters")
    gates = "one gate each" if record.personal_gates else "one gate for all"
    click.echo(f"devices    {record.experts}, {gates}, latents of {record.latent_dim} numbers")
    click.echo(f"trained    seed {record.seed}, with torch {record.versions['torch']}")
    click.echo("verified: every file is as run.json says, and every network takes its weights")


def main() -> None:
    """The entry point; a package that an extra brings and that is not there is one line and exit 1."""
    try:
        cli(prog_name="nmoe-train")
    except ModuleNotFoundError as error:
        if error.name not in _FROM_EXTRA:
            raise
        click.echo(f"nmoe-train: {error.name} is not installed; pip install 'nmoe[train]'", err=True)
        sys.exit(1)
