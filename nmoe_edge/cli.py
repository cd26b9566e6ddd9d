"""`nmoe-edge`: what is done on a device. Commands parse, call one library function, print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmoe_edge.errors import EdgeError
from nmoe_edge.program import EXIT_STATUS, SETTINGS, run_program

if TYPE_CHECKING:
    from nmoe_edge.bundle import Bundle
    from nmoe_edge.fleet import Fleet


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Run one device of a networked mixture of experts."""


@cli.command(epilog="Example: nmoe-edge inspect fleet/kitchen")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, or the fleet, as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify FOLDER, a bundle or a whole fleet of them, and say what is in it.

    Every file is read and its digest compared. Nothing is run, so this works without onnxruntime.
    """
    from nmoe_edge.bundle import read_bundle
    from nmoe_edge.fleet import FLEET_FILE, read_fleet_folder
    from nmoe_edge.schema import to_plain

    if os.path.isfile(folder / FLEET_FILE):  # where Path.is_file raises, say for a name that is too long, this is False
        fleet, bundles = read_fleet_folder(folder)
        click.echo(json.dumps(to_plain(fleet), indent=2) if as_json else _fleet_table(fleet, bundles))
    else:
        bundle = read_bundle(folder)
        click.echo(json.dumps(to_plain(bundle.manifest), indent=2) if as_json else _bundle_table(bundle))


@cli.command(epilog="Example: nmoe-edge selftest fleet/kitchen")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="CPU threads a graph.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a bundle.")
def selftest(bundles: tuple[Path, ...], threads: int, as_json: bool) -> None:
    """Verify each BUNDLE and replay what its exporter saw, on this very machine.

    A fleet's folder stands for all of its bundles that are here.
    """
    from nmoe_edge.bundle import read_bundle
    from nmoe_edge.models import Models, run_selftest
    from nmoe_edge.schema import to_plain

    failed = False
    for folder in [member for given in bundles for member in _members(given)]:
        bundle = read_bundle(folder)
        result = run_selftest(Models(bundle, threads), bundle)
        failed |= not result.passed
        if as_json:
            click.echo(json.dumps({"bundle": str(folder), **to_plain(result)}))
            continue
        click.echo(
            f"{folder}: {'passed' if result.passed else 'FAILED'} on {result.rows} inputs;"
            f" latents differ by {result.latent_difference:.2g} (allowed {bundle.selftest.latent_tolerance:.2g}),"
            f" outputs by {result.output_difference:.2g} (allowed {bundle.selftest.output_tolerance:.2g}),"
            f" {result.other_choices} other choices of the gate"
        )
    sys.exit(1 if failed else 0)


def _members(folder: Path) -> list[Path]:
    """A bundle's folder itself, or those of a fleet's bundles that are in it."""
    from nmoe_edge.fleet import FLEET_FILE, read_fleet

    if not os.path.isfile(folder / FLEET_FILE):
        return [folder]
    here = [folder / device.name for device in read_fleet(folder / FLEET_FILE).device]
    return [member for member in here if os.path.isdir(member)] or [folder]


def _bundle_table(bundle: Bundle) -> str:
    manifest = bundle.manifest
    routing, precision = manifest.routing, manifest.precision
    at_home = (
        "the gate alone decides" if routing.local_first is None else f"at home when surer than {routing.local_first}"
    )
    names = ", ".join(bundle.labels) if bundle.labels else "no labels"
    facts = {
        "device": f"{manifest.device}, expert {manifest.expert} of {manifest.experts}",
        "bundle": manifest.digest,
        "trunk": manifest.trunk,
        "input": f"{manifest.input.dtype} {list(manifest.input.shape)} {manifest.input.layout}",
        "latent": f"{manifest.latent.dim} numbers, {manifest.latent.dtype} on the wire",
        "outputs": f"{manifest.outputs}: {names}",
        "routing": f"top-{routing.top_k}, {at_home}, {routing.combination} are combined",
        "precision": f"extractor {precision.extractor}, gate {precision.gate}, expert {precision.expert}",
        "target": f"{manifest.target}, opset {manifest.opset}, IR {manifest.ir_version}",
        "accuracy": ", ".join(f"{name} {share:.1%}" for name, share in manifest.accuracy.items()) or "not measured",
    }
    lines = [f"{key:<10} {value}" for key, value in facts.items()]
    lines += [f"{'':<10} {name:<15} {entry.bytes:>10,} bytes" for name, entry in manifest.files.items()]
    return "\n".join([*lines, "verified: every file is as its manifest says"])


def _fleet_table(fleet: Fleet, bundles: dict[str, Bundle]) -> str:
    width = max(len(device.name) for device in fleet.device)
    lines = [
        f"{device.name:<{width}}  expert {device.expert:<4} {device.address}"
        f"  {'CURVE' if device.public_key else 'no key: loopback only'}"
        f"{'' if device.name in bundles else '  not here'}"
        for device in fleet.device
    ]
    trunk = next(iter(bundles.values())).manifest.trunk
    return "\n".join([*lines, f"verified: {len(bundles)} bundles of one trunk, {trunk}"])


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-edge", EdgeError, "edge", ("onnxruntime", "PIL", "psutil"))
