"""`nmoe-export`: from a training run to what travels to the devices."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_FROM_EXTRA = ("torch", "torchvision", "safetensors", "sklearn", "onnx", "onnxscript", "onnxruntime")
"""What the command may find missing: the extra `export` brings them."""

RUNS = Path("runs")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples: nmoe-export
          nmoe-export runs/digits --out bundles/digits

Exit status: 0 the fleet is written; 1 it is not, and one line says why; 2 the command was misspelt.""",
)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The fleet folder.  [default: bundles/<name of the run>]")
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli(run: Path | None, out: Path | None) -> None:
    """Turn RUN (default: the newest in runs/) into one verified float32 ONNX bundle a device.

    The folder that is written holds a folder for each device and fleet.toml, which names them all. Edit the addresses
    there, then copy a device's folder and fleet.toml to it.
    """
    run = run if run is not None else _newest_run()
    out = out if out is not None else Path("bundles") / run.resolve().name

    from nmoe_export.errors import ExportError
    from nmoe_export.fleet import export_run

    try:
        fleet = export_run(run, out, lambda line: click.echo(line, err=True))
    except ExportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {len(fleet.device)} bundles; next: nmoe-edge inspect {out}")


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise click.ClickException(f"no run stands in {RUNS}/; name one, or train one with nmoe-train")
    return runs[-1].parent


def main() -> None:
    """The entry point; a package that an extra brings and that is not there is one line and exit 1."""
    try:
        cli(prog_name="nmoe-export")
    except ModuleNotFoundError as error:
        if error.name not in _FROM_EXTRA:
            raise
        click.echo(f"nmoe-export: {error.name} is not installed; pip install 'nmoe[export]'", err=True)
        sys.exit(1)
