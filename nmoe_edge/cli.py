"""`nmoe-edge`: what is done on a device. Commands parse, call one library function, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge.bench.cli import bench
from nmoe_edge.common.command import EXIT_STATUS, SETTINGS, run_program
from nmoe_edge.common.text import counted, one_line
from nmoe_edge.display import answer_lines, bundle_table, fleet_table, ready_line, status_table
from nmoe_edge.errors import EdgeError

if TYPE_CHECKING:
    from nmoe_edge.client import Client
    from nmoe_edge.device.node import Node


@click.group(context_settings=SETTINGS, epilog=EXIT_STATUS)
@click.version_option(package_name="nmoe", message="%(prog)s %(version)s")
def cli() -> None:
    """Run one device of a networked mixture of experts."""


cli.add_command(bench)


@cli.command(epilog="Example: nmoe-edge inspect fleet/kitchen")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, or the fleet, as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Verify FOLDER, a bundle or a whole fleet of them, and say what is in it.

    Every file is read and its digest compared. Nothing is run, so this works without onnxruntime.
    """
    from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet_folder
    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.schema import to_plain

    if os.path.isfile(folder / FLEET_FILE):  # where Path.is_file raises, say for a name that is too long, this is False
        fleet, bundles = read_fleet_folder(folder)
        click.echo(json.dumps(to_plain(fleet), indent=2) if as_json else fleet_table(fleet, bundles))
    else:
        bundle = read_bundle(folder)
        click.echo(json.dumps(to_plain(bundle.manifest), indent=2) if as_json else bundle_table(bundle))


@cli.command(epilog="Example: nmoe-edge selftest fleet/kitchen")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="CPU threads a graph.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a bundle.")
def selftest(bundles: tuple[Path, ...], threads: int, as_json: bool) -> None:
    """Verify each BUNDLE and replay what its exporter saw, on this very machine.

    A fleet's folder stands for all of its bundles that are here.
    """
    from nmoe_edge.bundle.folder import read_bundle
    from nmoe_edge.common.schema import to_plain
    from nmoe_edge.models import Models, run_selftest

    failed = False
    for folder in [member for given in bundles for member in _members(given)]:
        bundle = read_bundle(folder)
        result = run_selftest(Models(bundle, threads), bundle)
        failed |= not result.passed
        if as_json:
            click.echo(json.dumps({"bundle": str(folder), **to_plain(result)}))
            continue
        click.echo(
            f"{folder}: {'passed' if result.passed else 'FAILED'} on {counted(result.rows, 'input')};"
            f" latents differ by {result.latent_difference:.2g} (allowed {bundle.selftest.latent_tolerance:.2g}),"
            f" outputs by {result.output_difference:.2g} (allowed {bundle.selftest.output_tolerance:.2g}),"
            f" {counted(result.other_choices, 'other choice')} of the gate"
        )
    sys.exit(1 if failed else 0)


@cli.command(
    epilog="""\b
Examples: nmoe-edge serve bundles/digits/device-00
          nmoe-edge serve device-00 --listen tcp://*:7101 --deadline-ms 200
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--fleet", type=click.Path(path_type=Path), help="[default: fleet.toml beside the bundle's folder]")
@click.option("--listen", metavar="tcp://HOST:PORT", help="[default: this device's address in the fleet]")
@click.option("--key", type=click.Path(path_type=Path), help="This device's key file.  [default: see keygen]")
@click.option(
    "--provider",
    type=click.Choice(("auto", "cpu", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="What runs the models; auto: the first of tensorrt, cuda, cpu that is here.",
)
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="CPU threads a graph.")
@click.option("--top-k", type=int, help="Experts a row is sent to.  [default: as the bundle says]")
@click.option("--deadline-ms", type=click.FloatRange(1, 3.6e6), default=1000, show_default=True, help="Of a request.")
@click.option("--latents", type=click.Choice(("int8", "fp16", "fp32")), help="On the wire.  [default: the bundle's]")
@click.option("--local-first", type=click.FloatRange(0, 1), help="Sureness that keeps a row here; 1: the gate decides.")
@click.option("--adapt/--no-adapt", default=None, help="Learn this device's class mix.  [default: the bundle's]")
@click.option("--forget", is_flag=True, help="Forget the class mix that was learnt before.")
@click.option("--prefer-near", type=click.FloatRange(0), default=0.0, help="Score a peer loses for each ms it takes.")
@click.option("--hedge/--no-hedge", default=True, show_default=True, help="Ask another too when one is late.")
@click.option(
    "--state", type=click.Path(path_type=Path), help="What is learnt is kept here.  [default: ~/.local/state/nmoe]"
)
@click.option("--discover", is_flag=True, help="Find peers by mDNS that are not where the fleet says.")
@click.option("--force", is_flag=True, help="Serve although the self-test fails.")
@click.option("--log-json", is_flag=True, help="Log in JSON, a line an event.")
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

    Inputs come from clients (nmoe-edge infer, or the Python Client), latents from the other devices. What is under way
    is finished before it ends, and the peers are told. SIGHUP, or a new bundle in the same place, is taken up without
    a request failing. Without keys only loopback is served.
    """
    import gc
    import signal
    import time

    from nmoe_edge.bundle.fleet import FLEET_FILE, fleet_file
    from nmoe_edge.common.log import StderrLog
    from nmoe_edge.common.memory import trim
    from nmoe_edge.device.node import Node
    from nmoe_edge.device.rules import Rules
    from nmoe_edge.device.saved_mix import default_state
    from nmoe_edge.errors import CallError, FleetError

    began = time.monotonic()
    if os.path.isfile(bundle / FLEET_FILE):
        raise FleetError(f"{bundle} is a whole fleet; serve one of its devices: {bundle}/NAME")
    beside = bundle.resolve().parent / FLEET_FILE
    fleet = fleet_file(fleet) if fleet is not None else beside if os.path.isfile(beside) else None
    log = StderrLog(bundle.resolve().name, log_json)
    rules = Rules(top_k, local_first, adapt, _LATENTS.get(latents), deadline_ms / 1000, prefer_near, hedge)
    state = state if state is not None else default_state()
    wanted: list[Callable[[Node], None]] = []
    serving: list[Node] = []

    def on(which: int, do: Callable[[Node], None]) -> None:
        """Signals that come before there is a node are not lost."""
        signal.signal(which, lambda *_: do(serving[0]) if serving else wanted.append(do))

    on(signal.SIGTERM, Node.leave)
    on(signal.SIGINT, Node.leave)
    on(signal.SIGHUP, Node.reload)
    node = Node(
        bundle,
        fleet,
        listen=listen,
        key=key,
        rules=rules,
        provider=provider,
        threads=threads,
        force=force,
        state=state,
        forget=forget,
        log=log,
    )
    serving.append(node)
    for do in wanted:
        do(node)
    sys.setswitchinterval(0.0005)  # under load the extractor's thread would wait ten times as long for its turn
    gc.collect()
    gc.freeze()  # what stays is never looked at again
    trim()
    with suppress(CallError):  # it was told to go meanwhile
        click.echo(f"{ready_line(node.status())}, in {time.monotonic() - began:.2f} s")
        sys.stdout.flush()
    with _discovery(node) if discover else nullcontext():
        while not node.ended.wait(_LISTEN_S):  # a signal that another thread was given is heard when this one wakes
            pass
    sys.exit(1 if node.broke else 0)


_LISTEN_S = 0.5


def _discovery(node: Node) -> AbstractContextManager[Any]:
    """mDNS for this node, until it ends."""
    from nmoe_edge.errors import NetworkError

    if not node.address:
        node.close()
        raise NetworkError("--discover: this device listens nowhere; give --fleet or --listen")
    try:
        from nmoe_edge.device.mdns import Discovery
    except ModuleNotFoundError as error:
        node.close()
        raise NetworkError(f"--discover: {error.name} is not installed; pip install 'nmoe[discover]'") from error
    manifest = node.models.manifest
    return closing(Discovery(manifest.device, manifest.trunk, node.address, node.peer_discovered))


_LATENTS: dict[str | None, Any] = {"int8": "int8", "fp16": "float16", "fp32": "float32"}


def _access(f: Any) -> Any:
    """Options of a command that speaks to a device."""
    f = click.option(
        "--key",
        type=click.Path(path_type=Path),
        help="Key file of a device.  [default: one that lies beside fleet.toml, or in FLEET-keys beside its folder]",
    )(f)
    return click.option(
        "--fleet", type=click.Path(path_type=Path), help="fleet.toml, or its folder: names, and needed with keys."
    )(f)


_AT = "The device to ask; with --fleet its name will do."


def _client(place: str, fleet: Path | None, key: Path | None) -> Client:
    """A client of the device at this address, or of this name; its keys from the fleet's file and a device's own."""
    from nmoe_edge.client import Client
    from nmoe_edge.keys import address_of, keys_to

    return Client(address_of(place, fleet), *keys_to(place, fleet, key))


@cli.command(
    epilog="""\b
Examples: nmoe-edge infer photo.jpg --at tcp://127.0.0.1:7101
          nmoe-edge infer test.npz --at device-00 --fleet bundles/digits --json
          nmoe-edge infer photo.jpg --bundle bundles/digits/device-00
"""
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--at", "place", metavar="tcp://HOST:PORT", help=_AT)
@click.option("--bundle", type=click.Path(path_type=Path), help="Or a bundle, to answer here and alone.")
@_access
@click.option("--deadline-ms", type=click.FloatRange(1, 3.6e6), default=1000, show_default=True, help="To wait.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a row.")
def infer(
    files: tuple[Path, ...],
    place: str | None,
    bundle: Path | None,
    fleet: Path | None,
    key: Path | None,
    deadline_ms: float,
    as_json: bool,
) -> None:
    """Have pictures, or rows in .npy or .npz files, answered.

    A picture is one row, whatever Pillow reads; an .npy holds one row or many, an .npz one such array, or one called
    inputs. One line a row: the label, how sure, who answered with which weight, and milliseconds.
    """
    from nmoe_edge.bundle.image import outside, read_rows
    from nmoe_edge.bundle.manifest import InputSpec
    from nmoe_edge.common.schema import from_plain
    from nmoe_edge.device.node import Node
    from nmoe_edge.errors import InputError

    if place is None and bundle is None:
        raise click.UsageError("Say who is to answer: --at a device, or --bundle a folder.")
    if place is not None and bundle is not None:
        raise click.UsageError("--at and --bundle are two who may answer: give one of them.")
    if place is None and (fleet is not None or key is not None):
        raise click.UsageError("--fleet and --key are for asking a device; a --bundle answers here and alone.")
    for path in files:
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: there is no such file, or it may not be read")
    with Node(bundle) if bundle is not None else _client(place or "", fleet, key) as device:
        facts = device.status()
        spec = from_plain(InputSpec, facts["input"])
        for path in files:
            rows = read_rows(path, spec)
            if unlike := outside(rows, spec):
                click.echo(f"nmoe-edge: warning: {one_line(f'{path}: {unlike}')}", err=True)
            together = max(1, min(_ROWS_A_CALL, _BYTES_A_CALL // rows[0].nbytes))
            for start in range(0, len(rows), together):
                answers = device.infer(rows[start : start + together], deadline_ms / 1000)
                for line in answer_lines(path, start, len(rows), answers, facts, as_json):
                    click.echo(line)


_ROWS_A_CALL, _BYTES_A_CALL = 64, 8 * 1024 * 1024


@cli.command(
    epilog="""\b
Examples: nmoe-edge status --at tcp://127.0.0.1:7101 --watch
          nmoe-edge status --at device-00 --fleet bundles/digits
"""
)
@click.option("--at", "place", required=True, metavar="tcp://HOST:PORT", help=_AT)
@_access
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(place: str, fleet: Path | None, key: Path | None, watch: bool, as_json: bool) -> None:
    """How a device is: its peers, round trips, counts and versions."""
    import time

    with suppress(KeyboardInterrupt) if watch else nullcontext(), _client(place, fleet, key) as device:
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
Examples: nmoe-edge keygen bundles/digits               every device's pair, at the desk
          nmoe-edge keygen . --device kitchen           one device's pair, on the device
"""
)
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--device", "names", multiple=True, help="Only this device's; may be given again.")
@click.option("--out", type=click.Path(path_type=Path), help="Where key files go.  [default: FLEET-keys, beside FLEET]")
@click.option("--force", is_flag=True, help="Give a device another key although its key file is not here.")
def keygen(fleet: Path, names: tuple[str, ...], out: Path | None, force: bool) -> None:
    """Make a CURVE key pair for devices of FLEET, a folder with a fleet.toml, and write the public keys into that.

    Secret keys go to NAME.key, readable by their owner alone. Copy a device's key file to it, beside its fleet.toml,
    and fleet.toml to everybody. A pair that is there already is kept; a public key in fleet.toml whose key file is
    not here is not replaced without --force.
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
        click.echo(f"{path}: nothing has changed, every public key is there already")
        return
    write_fleet(path, keyed)  # running devices read it again whenever it is written
    for device in keyed.device:
        if device.name in names:
            click.echo(f"{key_path(path, device.name, out)}  public {device.public_key}")
    click.echo(
        f"{path}: {counted(len(names), 'public key')} written; copy each key file to its device, and {path.name} to all"
    )


def _members(folder: Path) -> list[Path]:
    """A bundle's folder itself, or those of a fleet's bundles that are in it."""
    from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet

    if not os.path.isfile(folder / FLEET_FILE):
        return [folder]
    here = [folder / device.name for device in read_fleet(folder / FLEET_FILE).device]
    return [member for member in here if os.path.isdir(member)] or [folder]


def main() -> None:
    """The entry point."""
    run_program(cli, "nmoe-edge", EdgeError, "edge", ("onnxruntime", "zmq", "PIL"))
