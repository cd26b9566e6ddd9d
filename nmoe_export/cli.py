"""`nmoe-export`: from a training run to what travels to the devices."""

from __future__ import annotations

import os
from pathlib import Path

import click

from nmoe_edge.program import EXIT_STATUS, SETTINGS, run_program
from nmoe_export.errors import ExportError, SourceError

_BROUGHT = ("torch", "torchvision", "safetensors", "sklearn", "onnx", "onnxscript", "onnxruntime", "PIL", "psutil")
RUNS = Path("runs")


@click.command(
    context_settings=SETTINGS,
    epilog=f"""\b
Examples: nmoe-export
          nmoe-export runs/digits --out bundles/digits

{EXIT_STATUS}""",
)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The fleet folder.  [default: bundles/<name of the run>]")
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli(run: Path | None, out: Path | None) -> None:
    """Turn RUN (default: the newest in runs/) into one verified float32 ONNX bundle a device.

    The folder that is written holds a folder for each device and fleet.toml, which names them all. Edit the addresses
    there, then copy a device's folder and fleet.toml to it. A second export keeps addresses and keys.
    """
    run = run if run is not None else _newest_run()
    out = out if out is not None else Path("bundles") / Path(os.path.abspath(run)).name

    from nmoe_export.fleet import export_run

    fleet = export_run(run, out, lambda line: click.echo(line, err=True))
    click.echo(f"{out}: {len(fleet.device)} bundles; next: nmoe-edge inspect {out}")


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise SourceError(f"no run stands in {RUNS}/; name one, or train one with nmoe-train")
    return runs[-1].parent


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-export", ExportError, "export", _BROUGHT)
