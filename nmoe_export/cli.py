"""`nmoe-export`: from a training run to what travels to the devices."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_edge.common.text import counted
from nmoe_export.errors import ExportError, SourceError
from nmoe_export.progress import Terminal

_BROUGHT = ("torch", "torchvision", "safetensors", "sklearn", "onnx", "onnxscript", "onnxruntime", "PIL")
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
    help="Your own torch modules: fleet() of ./theirs.py is theirs:fleet; see README.",
)
@click.option("--int8", "precision", flag_value="int8", help="Integer graphs, where they are faster and right.")
@click.option("--fp16", "precision", flag_value="fp16", help="Float16 graphs: half the bytes, and for GPUs.")
@click.option("--fp32", "precision", flag_value="fp32", help="Float graphs.  [default]")
@click.option("--target", default="auto", show_default=True, help="Of int8: auto (this CPU), x86, pi or jetson.")
@click.option("--calibration", default="default", show_default=True, help="Of int8: a recipe's name, or a file.toml.")
@click.option(
    "--max-drop", type=float, default=0.5, show_default=True, help="Points of accuracy that int8 or fp16 may cost."
)
@click.option(
    "--latent",
    type=click.Choice(("float16", "int8", "float32")),
    default="float16",
    show_default=True,
    help="What latents travel as.",
)
@click.option("--devices", metavar="LIST", help="Whose folders to write, as 0,3-5.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), help="The fleet folder.  [default: bundles/<name of the run>]")
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
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
    """Turn RUN (default: the newest in runs/) into one verified ONNX bundle a device.

    The folder that is written holds a folder for each device and fleet.toml, which names them all. Edit the addresses
    there, then copy a device's folder and fleet.toml to it. A second export keeps addresses and keys, and does nothing
    when nothing has changed. What was measured stands in report.json.
    """
    if run is not None and modules is not None:
        raise SourceError("a run and --modules are two sources; name one")
    if modules is None:
        run = run if run is not None else _newest_run()
    name = modules.partition(":")[0] if modules is not None else Path(os.path.abspath(run or "")).name
    out = out if out is not None else Path("bundles") / name

    from nmoe_export.calibrate import read_recipe
    from nmoe_export.export import Options, export_fleet, export_run
    from nmoe_export.source import of_factory
    from nmoe_export.targets import target_of

    if not max_drop >= 0:
        raise SourceError(f"--max-drop {max_drop}: not a number from 0 on")
    target_of(target)
    chosen = _devices(devices) if devices is not None else None
    options = Options(precision or "fp32", target, read_recipe(calibration), max_drop, latent, chosen)  # type: ignore[arg-type]
    say = Terminal()
    try:
        if modules is not None:
            done = export_fleet(of_factory(modules), out, options, say)
        else:
            done = export_run(run or "", out, options, say)
    finally:
        say.end()
    if as_json:
        click.echo(json.dumps(done.report, indent=2))
        return
    if not done.changed:
        click.echo(f"{out}: nothing has changed since it was exported")
    for line in _table(done.report):
        click.echo(line)
    bundles = sum(os.path.isdir(out / device.name) for device in done.fleet.device)
    click.echo(f"{out}: {counted(bundles, 'bundle')}; next: nmoe-edge inspect {out}")


def _devices(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 0,3-5."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise SourceError(f"--devices {text}: {part!r} is no number and no range such as 3-5")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def _table(report: Mapping[str, Any]) -> list[str]:
    """What int8 or float16 is worth, for people."""
    precision = report.get("precision")
    if precision not in ("int8", "fp16"):
        return []
    lines = [f"{'':<11}{'is':>6}{'float ms':>10}{precision + ' ms':>9}{'faster':>8}{'bytes':>13}"]
    for name in ("extractor", "gate", "expert"):
        speed = report["speed"].get(name)
        known = isinstance(speed, dict)
        cells = [f"{speed[key]:.3f}" if known else "–" for key in ("float_ms", "written_ms")]
        faster = f"{speed['times_faster']:.2f} ×" if known else "–"
        size = f"{report['bytes'][f'{name}.onnx']:,}"
        lines.append(f"{name:<11}{report['is'][name]:>6}{cells[0]:>10}{cells[1]:>9}{faster:>8}{size:>13}")
    kind = "right answers" if report["measured_by"] == "labels" else "answers as float gives them"
    lines.append(
        f"{kind}: {report['accuracy_written']:.1f} %, {report['drop']:.2f} points below float;"
        f" the gates agree on {report['gate_agreement']:.1%}"
    )
    worst = report["worst"]
    lines.append(f"worst is {worst['device']}: {worst['drop']:.2f} points below float")
    fusion = report.get("fusion", {})
    if "convs" in fusion:
        lines.append(
            f"integer: {fusion['convs_integer']} of {fusion['convs']} convolutions, {fusion['adds_integer']} of"
            f" {fusion['adds']} residual additions; {fusion['pairs_left']} nodes still round"
        )
    if report.get("reverted"):
        lines.append(f"back in float: {', '.join(entry['node'] for entry in report['reverted'])}")
    return lines


def _newest_run() -> Path:
    runs = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise SourceError(f"no run stands in {RUNS}/; name one, or train one with nmoe-train")
    return runs[-1].parent


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-export", ExportError, "export", _BROUGHT)
