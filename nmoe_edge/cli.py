"""The command nmoe-edge. Each command parses its options, calls one library function and prints the result."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge import options
from nmoe_edge.bench.cli import bench
from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_edge.common.text import counted, one_line
from nmoe_edge.display import answer_lines, bundle_table, fleet_table, ready_line, selftest_line, status_table
from nmoe_edge.errors import EdgeError
from nmoe_edge.options import LATENT_TYPES, PATH

if TYPE_CHECKING:
    from nmoe_edge.client import Client

_MAX_ROWS_PER_CALL = 64
_MAX_BYTES_PER_CALL = 8 * 1024 * 1024


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve, ask and check the devices of a networked mixture of experts.

    A bundle is the folder of one device, as nmoe-export writes it. A fleet is a folder of bundles with a fleet.toml.
    """


cli.add_command(bench)


@cli.command(epilog="Example: nmoe-edge inspect bundles/digits/device-00", short_help="Verify a bundle or a fleet.")
@click.argument("folder", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest or the fleet as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify FOLDER, a bundle or a fleet, and print what it contains.

    Checks the digest of every file. Runs no model, so it works without onnxruntime.
    """
    from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet_folder
    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.schema import to_plain

    # os.path.isfile returns False where Path.is_file raises, such as for a name that is too long.
    if os.path.isfile(folder / FLEET_FILE):
        fleet, bundles = read_fleet_folder(folder)
        click.echo(json.dumps(to_plain(fleet), indent=2) if as_json else fleet_table(fleet, bundles))
    else:
        bundle = read_bundle(folder)
        click.echo(json.dumps(to_plain(bundle.manifest), indent=2) if as_json else bundle_table(bundle))


@cli.command(
    epilog="""\b
Examples:
  nmoe-edge selftest bundles/digits/device-00
  nmoe-edge selftest bundles/digits
""",
    short_help="Check that this machine computes a bundle correctly.",
)
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@options.threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per bundle.")
def selftest(bundles: tuple[Path, ...], threads: int, as_json: bool) -> None:
    """Check that this machine computes each BUNDLE as its exporter did.

    Verifies the bundle, runs its models on the inputs of its self-test and compares with the recorded results. Needs
    onnxruntime. A fleet folder stands for every bundle in it. Exits 1 if any bundle fails.
    """
    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.schema import to_plain
    from nmoe_edge.models import Models, run_selftest

    failed = False
    folders = [folder for given in bundles for folder in _bundle_folders(given)]
    for folder in folders:
        bundle = read_bundle(folder)
        result = run_selftest(Models(bundle, threads), bundle)
        failed |= not result.passed
        if as_json:
            click.echo(json.dumps({"bundle": str(folder), **to_plain(result)}))
        else:
            click.echo(selftest_line(folder, bundle.selftest, result))
    sys.exit(1 if failed else 0)


@cli.command(
    epilog="""\b
Examples:
  nmoe-edge serve bundles/digits/device-00
  nmoe-edge serve device-00 --listen tcp://*:7101 --deadline-ms 200
""",
    short_help="Serve a bundle as one device of its fleet.",
)
@click.argument("bundle", type=PATH)
@click.option("--fleet", type=PATH, help="fleet.toml or its folder.  [default: fleet.toml next to BUNDLE]")
@click.option(
    "--listen", metavar="tcp://HOST:PORT", help="Address to listen at.  [default: this device's address in the fleet]"
)
@options.own_key
@options.provider
@options.threads
@click.option("--top-k", type=int, metavar="K", help="Experts that answer each row.  [default: the bundle's]")
@options.deadline("Longest time a request may take; a client may ask for less.")
@click.option(
    "--latents",
    type=click.Choice(tuple(LATENT_TYPES)),
    help="Number type of latents sent to peers.  [default: the bundle's]",
)
@click.option(
    "--local-first",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Answer a row locally when this device's expert is more confident than this; at 1 the gate alone decides."
    "  [default: the bundle's]",
)
@click.option(
    "--adapt/--no-adapt",
    default=None,
    help="Learn how often this device sees each class, and weight answers by it.  [default: the bundle's]",
)
@click.option("--forget", is_flag=True, help="Discard the class mix learned earlier.")
@options.number(
    "--prefer-near",
    click.FloatRange(0),
    default=0.0,
    metavar="L",
    text="Gate score that a peer loses per millisecond it usually takes.",
)
@click.option("--hedge/--no-hedge", default=True, show_default=True, help="Ask a second expert when the first is late.")
@click.option("--state", type=PATH, help="Folder that keeps the learned class mix.  [default: ~/.local/state/nmoe]")
@click.option("--discover", is_flag=True, help="Find peers by mDNS if they are not at their address in the fleet.")
@click.option("--force", is_flag=True, help="Serve even if the self-test fails.")
@click.option("--log-json", is_flag=True, help="Log one JSON object per event.")
def serve(
    bundle: Path,
    fleet: Path | None,
    listen: str | None,
    key: Path | None,
    provider: str,
    threads: int,
    top_k: int | None,
    deadline_ms: float,
    latents: str | None,
    local_first: float | None,
    adapt: bool | None,
    forget: bool,
    prefer_near: float,
    hedge: bool,
    state: Path | None,
    discover: bool,
    force: bool,
    log_json: bool,
) -> None:
    """Serve BUNDLE as one device of its fleet until SIGTERM or Ctrl-C.

    Answers clients (nmoe-edge infer, or the Python Client) and the other devices. Runs the bundle's self-test first.
    Without keys it serves this machine alone (loopback); keygen makes keys.

    SIGHUP, or a new bundle in the same folder, reloads the bundle; no request fails. On SIGTERM or Ctrl-C the device
    tells its peers and finishes its open requests.
    """
    import time

    from nmoe_edge.common.log import StderrLog
    from nmoe_edge.device.node import Node
    from nmoe_edge.device.process import Signals, discovery, prepare_interpreter, wait_until_ended
    from nmoe_edge.device.rules import Rules
    from nmoe_edge.device.saved_mix import default_state
    from nmoe_edge.errors import CallError

    began = time.monotonic()
    fleet = _fleet_of(bundle, fleet)
    latent_type: Any = None if latents is None else LATENT_TYPES[latents]
    signals = Signals()
    node = Node(
        bundle,
        fleet,
        listen=listen,
        key=key,
        rules=Rules(top_k, local_first, adapt, latent_type, deadline_ms / 1000, prefer_near, hedge),
        provider=provider,
        threads=threads,
        force=force,
        state=state if state is not None else default_state(),
        forget=forget,
        log=StderrLog(bundle.resolve().name, log_json),
    )
    signals.attach(node)
    prepare_interpreter()
    with suppress(CallError):  # a signal may have stopped the node already
        click.echo(f"{ready_line(node.status())}, in {time.monotonic() - began:.2f} s")
        sys.stdout.flush()
    with discovery(node) if discover else nullcontext():
        wait_until_ended(node)
    sys.exit(1 if node.failed else 0)


def _fleet_of(bundle: Path, fleet: Path | None) -> Path | None:
    """The fleet file to serve `bundle` with: the one given, or the one next to the bundle's folder, or None."""
    from nmoe_edge.bundle.fleet import FLEET_FILE, fleet_file
    from nmoe_edge.errors import FleetError

    if os.path.isfile(bundle / FLEET_FILE):
        raise FleetError(f"{bundle} is a fleet folder; serve one of its devices: {bundle}/NAME")
    if fleet is not None:
        return fleet_file(fleet)
    adjacent = bundle.resolve().parent / FLEET_FILE
    return adjacent if os.path.isfile(adjacent) else None


def _client(target: str, fleet: Path | None, key: Path | None) -> Client:
    """A client of the device with this address or name, with the keys that the fleet needs."""
    from nmoe_edge.client import Client
    from nmoe_edge.keys import address_of, keys_to

    return Client(address_of(target, fleet), *keys_to(target, fleet, key))


@cli.command(
    epilog="""\b
Examples:
  nmoe-edge infer photo.jpg --at tcp://127.0.0.1:7101
  nmoe-edge infer test.npz --at device-00 --fleet bundles/digits --json
  nmoe-edge infer photo.jpg --bundle bundles/digits/device-00
""",
    short_help="Send pictures or arrays to a device and print the answers.",
)
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@options.target()
@click.option("--bundle", type=PATH, help="Instead of --at: a bundle to answer with on this machine, without peers.")
@options.access
@options.deadline("How long to wait for the answers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row.")
def infer(
    files: tuple[Path, ...],
    target: str | None,
    bundle: Path | None,
    fleet: Path | None,
    key: Path | None,
    deadline_ms: float,
    as_json: bool,
) -> None:
    """Send the pictures or arrays in each FILE to a device and print the answers.

    Needs a device that serves (--at) or a bundle (--bundle). A picture is one row, in any format that Pillow reads. An
    .npy file holds one row or several; an .npz file holds one such array, or one named inputs.

    Prints one line per row: the label, the confidence, the experts that answered with their weights, and the time.
    """
    from nmoe_edge.bundle.image import range_warning, read_rows
    from nmoe_edge.bundle.manifest import InputSpec
    from nmoe_edge.common.log import StderrLog
    from nmoe_edge.common.schema import from_plain
    from nmoe_edge.device.node import Node
    from nmoe_edge.errors import InputError

    if target is None and bundle is None:
        raise click.UsageError("Nothing to answer with: give --at DEVICE or --bundle FOLDER.")
    if target is not None and bundle is not None:
        raise click.UsageError("Give either --at or --bundle, not both.")
    if target is None and (fleet is not None or key is not None):
        raise click.UsageError("--fleet and --key go with --at; a --bundle answers without peers.")
    for path in files:
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: no such file, or no permission to read it")
    alone = None if bundle is None else Node(bundle, log=StderrLog(bundle.resolve().name))
    with alone or _client(target or "", fleet, key) as device:
        facts = device.status()
        spec = from_plain(InputSpec, facts["input"])
        for path in files:
            rows = read_rows(path, spec)
            if unlike := range_warning(rows, spec):
                click.echo(f"nmoe-edge: warning: {one_line(f'{path}: {unlike}')}", err=True)
            rows_per_call = max(1, min(_MAX_ROWS_PER_CALL, _MAX_BYTES_PER_CALL // rows[0].nbytes))
            for start in range(0, len(rows), rows_per_call):
                answers = device.infer(rows[start : start + rows_per_call], deadline_ms / 1000)
                for line in answer_lines(path, start, len(rows), answers, facts, as_json):
                    click.echo(line)


@cli.command(
    epilog="""\b
Examples:
  nmoe-edge status --at tcp://127.0.0.1:7101 --watch
  nmoe-edge status --at device-00 --fleet bundles/digits
""",
    short_help="Print a device's state, peers and counters.",
)
@options.target(required=True)
@options.access
@click.option("--watch", is_flag=True, help="Print it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(target: str, fleet: Path | None, key: Path | None, watch: bool, as_json: bool) -> None:
    """Print the state of a device that serves: versions, rules, peers with round trips, and counters."""
    import time

    with suppress(KeyboardInterrupt) if watch else nullcontext(), _client(target, fleet, key) as device:
        while True:
            facts = device.status()
            if watch and not as_json and sys.stdout.isatty():
                click.clear()
            click.echo(json.dumps(facts) if as_json else status_table(facts))
            if not watch:
                return
            time.sleep(1)


@cli.command(
    epilog="""\b
Examples:
  nmoe-edge keygen bundles/digits        keys for every device
  nmoe-edge keygen . --device kitchen    keys for one device, on that device
""",
    short_help="Make CURVE keys for the devices of a fleet.",
)
@click.argument("fleet", type=PATH)
@click.option("--device", "names", multiple=True, metavar="NAME", help="Only this device; repeat it for more.")
@click.option("--out", type=PATH, help="Folder for the key files.  [default: FLEET-keys, next to FLEET]")
@click.option(
    "--force", is_flag=True, help="Replace a device's public key even if its key file is missing or does not match."
)
def keygen(fleet: Path, names: tuple[str, ...], out: Path | None, force: bool) -> None:
    """Make a CURVE key pair for each device of FLEET, and write the public keys into its fleet.toml.

    FLEET is a folder with a fleet.toml, or that file. Each secret key goes into a file NAME.key that only its owner can
    read. Copy a device's key file to that device, next to its fleet.toml; copy fleet.toml to every device.

    Existing pairs are kept. A public key without its matching key file is replaced only with --force.
    """
    from nmoe_edge.bundle.fleet import fleet_file, read_fleet, write_fleet
    from nmoe_edge.keys import key_path, with_keys

    path = fleet_file(fleet)
    described = read_fleet(path)
    names = names or tuple(device.name for device in described.device)
    for name in names:
        described.named(name)
    keyed = with_keys(described, names, out, path, force=force)
    if keyed == described:
        click.echo(f"{path}: nothing to do, every device already has its public key")
        return
    write_fleet(path, keyed)  # running devices reload a fleet.toml that is written, so an unchanged one is not written
    for device in keyed.device:
        if device.name in names:
            click.echo(f"{key_path(path, device.name, out)}  public {device.public_key}")
    click.echo(
        f"{path}: {counted(len(names), 'public key')} written."
        f" Copy each key file to its device, and {path.name} to every device."
    )


def _bundle_folders(folder: Path) -> list[Path]:
    """The bundle folders that `folder` stands for: itself, or for a fleet's folder the bundles in it."""
    from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet

    if not os.path.isfile(folder / FLEET_FILE):
        return [folder]
    members = [folder / device.name for device in read_fleet(folder / FLEET_FILE).device]
    return [member for member in members if os.path.isdir(member)] or [folder]


def main() -> None:
    """The entry point of nmoe-edge."""
    run_program(cli, "nmoe-edge", EdgeError, "edge", ("onnxruntime", "zmq", "PIL"))
