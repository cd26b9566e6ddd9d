"""`nmoe-export`: parses the command line, calls `export_fleet`, prints a summary."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_edge.common.progress import ProgressLine
from nmoe_edge.common.text import counted
from nmoe_export.errors import ExportError, SourceError

_EXTRA_PACKAGES = ("torch", "torchvision", "safetensors", "sklearn", "onnx", "onnxscript", "onnxruntime", "PIL")
RUNS = Path("runs")


@click.command(
    context_settings=SETTINGS,
    epilog=f"""\b
Examples: nmoe-export
          nmoe-export --int8
          nmoe-export runs/digits --int8 --target pi --calibration percentile --out bundles/digits

{EXIT_STATUS}""",
)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--modules",
    metavar="MODULE:FACTORY",
    help="Export your own torch modules: theirs:fleet is the function fleet() in ./theirs.py; see README.md.",
)
@click.option("--int8", "precision", flag_value="int8", help="Integer graphs, where they are faster and accurate.")
@click.option("--fp16", "precision", flag_value="fp16", help="Float16 graphs: half the size, made for GPUs.")
@click.option("--fp32", "precision", flag_value="fp32", help="Float32 graphs.  [default]")
@click.option(
    "--target", default="auto", show_default=True, help="Device for --int8: auto (this CPU), x86, pi or jetson."
)
@click.option(
    "--calibration",
    default="default",
    show_default=True,
    help="For --int8: a recipe's name, or a file.toml.",
)
@click.option(
    "--max-drop",
    type=float,
    default=0.5,
    show_default=True,
    help="Percentage points of accuracy that --int8 or --fp16 may cost.",
)
@click.option(
    "--latent",
    type=click.Choice(("float16", "int8", "float32")),
    default="float16",
    show_default=True,
    help="Type of the latents that devices send each other.",
)
@click.option("--devices", metavar="LIST", help="Devices to write folders for, such as 0,3-5.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), help="The fleet folder.  [default: bundles/<name of the run>]")
@click.option("--json", "as_json", is_flag=True, help="Print the contents of report.json.")
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli(
    run: Path | None,
    modules: str | None,
    precision: str | None,
    target: str,
    calibration: str,
    max_drop: float,
    latent: str,
    devices: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Turn RUN (default: the newest in runs/) into verified ONNX bundles, one for each device.

    The output folder holds a folder for each device and fleet.toml, which lists all of them. Edit the addresses in
    fleet.toml, then copy a device's folder and fleet.toml to that device. Another export keeps addresses and keys, and
    does nothing when the folder is up to date. report.json and report.html hold the measurements.
    """
    if run is not None and modules is not None:
        raise SourceError("give either a run or --modules, not both")
    if run is None and modules is None:
        run = _newest_run()
    if out is None:
        out = Path("bundles") / (modules.partition(":")[0] if modules else Path(os.path.abspath(run or "")).name)
    if not max_drop >= 0:  # NaN too
        raise SourceError(f"--max-drop {max_drop}: expected 0 or more percentage points")
    wanted = _parse_devices(devices) if devices is not None else None

    from nmoe_export.calibrate import read_recipe
    from nmoe_export.export import Options, export_fleet
    from nmoe_export.source import of_factory
    from nmoe_export.targets import target_of

    target_of(target)  # before a factory runs, which may take a while
    options = Options(precision or "fp32", target, read_recipe(calibration), max_drop, latent, wanted)  # type: ignore[arg-type]
    progress = ProgressLine()
    try:
        source = of_factory(modules) if modules is not None else run or ""
        done = export_fleet(source, out, options, progress)
    finally:
        progress.end()
    if as_json:
        click.echo(json.dumps(done.report, indent=2))
        return
    if not done.changed:
        click.echo(f"{out}: up to date, nothing was written")
    for line in _table(done.report):
        click.echo(line)
    bundles = sum(os.path.isdir(out / device.name) for device in done.fleet.device)
    click.echo(f"{out}: {counted(bundles, 'bundle')}; next: nmoe-edge inspect {out}")


def _parse_devices(text: str) -> tuple[int, ...]:
    """The numbers in a list such as 0,3-5, without repetitions."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        first = int(match[1]) if match else 1
        last = int(match[2] or match[1]) if match else 0
        if last < first:
            raise SourceError(f"--devices {text}: {part!r} is not a number or a range such as 3-5")
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def _table(report: Mapping[str, Any]) -> list[str]:
    """What int8 or float16 gains and costs, line by line; nothing for float32."""
    precision = report.get("precision")
    if precision not in ("int8", "fp16"):
        return []
    lines = [f"{'':<11}{'is':>6}{'float ms':>10}{precision + ' ms':>9}{'faster':>8}{'bytes':>13}"]
    for name in ("extractor", "gate", "expert"):
        timing = report["speed"].get(name)
        if isinstance(timing, dict):
            speed = f"{timing['float_ms']:>10.3f}{timing['written_ms']:>9.3f}{timing['times_faster']:>6.2f} ×"
        else:
            speed = f"{'–':>10}{'–':>9}{'–':>8}"
        size = report["bytes"][f"{name}.onnx"]
        lines.append(f"{name:<11}{report['is'][name]:>6}{speed}{size:>13,}")
    measured_by = "right answers" if report["measured_by"] == "labels" else "same answers as float"
    lines.append(
        f"{measured_by}: {report['accuracy_written']:.1f} %, {report['drop']:.2f} points below float;"
        f" the gates agree on {report['gate_agreement']:.1%}"
    )
    worst = report["worst"]
    lines.append(f"worst device: {worst['device']}, {worst['drop']:.2f} points below float")
    fusion = report.get("fusion", {})
    if "convs" in fusion:
        lines.append(
            f"integer: {fusion['convs_integer']} of {fusion['convs']} convolutions, {fusion['adds_integer']} of"
            f" {fusion['adds']} residual additions; {fusion['pairs_left']} nodes convert between integer and float"
        )
    if report.get("reverted"):
        lines.append(f"back in float: {', '.join(entry['node'] for entry in report['reverted'])}")
    return lines


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise SourceError(f"there is no run in {RUNS}/; name one, or train one with nmoe-train")
    return runs[-1].parent


def main() -> None:
    run_program(cli, "nmoe-export", ExportError, "export", _EXTRA_PACKAGES)
