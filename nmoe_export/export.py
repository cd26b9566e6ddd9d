"""The one way through an export: a source -> graphs -> the precision that was asked for -> bundles in a fleet folder.

Bundles are written by nmoe_edge's own code, read back and self-tested before the folder takes its place. A folder that
is up to date is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch

from nmoe_edge.bundle.fleet import FILES as FLEET_FILES
from nmoe_edge.bundle.fleet import FLEET_FILE, Device, Fleet
from nmoe_edge.bundle.fleet import SCHEMA as FLEET_SCHEMA
from nmoe_edge.bundle.folder import Bundle, write_bundle
from nmoe_edge.bundle.manifest import Manifest, sha256
from nmoe_edge.common.folders import check_replaceable, staged_folder
from nmoe_edge.common.progress import Count, Progress
from nmoe_edge.common.text import counted
from nmoe_edge.errors import EdgeError
from nmoe_edge.models import Models, run_selftest
from nmoe_export.bundles import device_bundle
from nmoe_export.calibrate import Recipe
from nmoe_export.errors import SourceError
from nmoe_export.existing import REPORT, Existing
from nmoe_export.graphs import export_graph, replace_weights
from nmoe_export.report import page
from nmoe_export.samples import samples_of
from nmoe_export.search import Chosen, search_fp16, search_int8
from nmoe_export.simulation import KINDS, Graphs, Simulation, latents_of
from nmoe_export.source import Source, key_of, of_run
from nmoe_export.targets import target_of
from nmoe_train.errors import TrainError
from nmoe_train.run import Run, read_run

FIRST_PORT = 7101
PAGE = "report.html"
FILES = rf"{FLEET_FILES}|report\.(json|html)"
"""What a fleet folder may hold, as a regular expression."""
PACKAGES = ("nmoe", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
"""A new version of one of these makes an export out of date."""
_EXAMPLES = 32
"""Samples that the exporter traces a module with."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to export a fleet.

    Example: `Options("int8", target="pi", max_drop=1.0, devices=(0, 3))`
    """

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """The precision of the graphs. With int8, graphs and nodes that would be slow or inaccurate stay in float."""
    target: str = "auto"
    """The device to quantize for: x86, pi, jetson, or auto for this machine's CPU. Used by int8."""
    recipe: Recipe = field(default_factory=Recipe)
    """Which samples calibrate, and how ranges are chosen. Used by int8. `read_recipe` reads one from a file."""
    max_drop: float = 0.5
    """How many percentage points of accuracy int8 or fp16 may cost, the mean over devices."""
    latent: Literal["float16", "int8", "float32"] = "float16"
    """The type that latents travel as. float16 is half the size of float32 and within a thousandth of its values."""
    devices: tuple[int, ...] | None = None
    """The devices to write a folder for; None writes all. fleet.toml names every device in any case."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16", "int8"):
            raise SourceError(f"precision is {self.precision!r}; expected fp32, fp16 or int8")
        if self.latent not in ("float16", "int8", "float32"):
            raise SourceError(f"latent is {self.latent!r}; expected float16, int8 or float32")
        if not self.max_drop >= 0:  # NaN too
            raise SourceError(f"max_drop is {self.max_drop}; expected 0 or more percentage points")


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export."""

    fleet: Fleet
    """The devices with their addresses, as fleet.toml has them."""
    report: dict[str, Any]
    """The contents of report.json: precision, sizes in bytes, speed in milliseconds, accuracy in percent."""
    changed: bool
    """False when the folder was up to date, and nothing was written."""


def _silent(_line: str) -> None:
    pass


def export_fleet(
    source: Source | Run | Path | str,
    out: Path | str,
    options: Options = Options(),
    progress: Progress = _silent,
) -> Exported:
    """Export a fleet to the folder `out`: one verified bundle for each device, fleet.toml and a report.

    Arguments:
        source: a training run (its folder or a `Run`), or your own modules as `of_modules` returns them.
        out: the fleet folder. It is written as a whole or not at all. An existing fleet there is replaced; its
            addresses and keys are kept. When it is up to date nothing is written.
        options: precision, target and so on.
        progress: is called with each line of progress.

    Raises ExportError: SourceError when the run, a module, the calibration samples or `out` cannot be used; GraphError
    when torch cannot export a module; DropError when int8 or fp16 costs more than `options.max_drop`.

    Example:
        from nmoe_export import Options, export_fleet

        done = export_fleet("runs/digits", "bundles/digits", Options("int8"), progress=print)
        print(done.report["drop"], [device.name for device in done.fleet.device])
    """
    out = Path(out)
    with _as_source_error():
        if isinstance(source, (str, Path)):
            source = read_run(source)
        with _as_write_error(out, OSError):
            existing = Existing(out)
        # The check comes before a run's networks are built, which takes longer.
        if isinstance(source, Run):
            key = _key(key_of(source), options)
            up_to_date = _up_to_date(key, source.record.experts, existing, options)
        else:
            key = _key(source.key, options)
            up_to_date = _up_to_date(key, len(source.experts), existing, options)
        if up_to_date is not None:
            return up_to_date
        if isinstance(source, Run):
            source = of_run(source)

        with _as_write_error(out, OSError, ValueError):
            check_replaceable(out, FLEET_FILE, FILES)  # before the long work
        graphs_report, chosen = _chosen(source, options, progress)
        with _fleet_folder(out) as staging:
            fleet, sizes = _write_devices(source, chosen, options, existing, staging, progress)
            report = graphs_report | chosen.report
            report |= {"key": key, "is": chosen.precision, "bytes": sizes}
            (staging / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
            (staging / PAGE).write_text(page(report), encoding="utf-8")
            (staging / FLEET_FILE).write_text(fleet.render())
    return Exported(fleet, report, changed=True)


@contextmanager
def _as_source_error() -> Iterator[None]:
    """Raise errors of the run and of bundles as SourceError."""
    try:
        yield
    except (TrainError, EdgeError) as error:
        raise SourceError(str(error)) from error


@contextmanager
def _as_write_error(out: Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise these errors as a SourceError that says that `out` cannot be written."""
    try:
        yield
    except errors as error:
        raise SourceError(f"{out}: cannot be written: {error}") from error


@contextmanager
def _fleet_folder(out: Path) -> Iterator[Path]:
    """`staged_folder` for a fleet. Of the caller's errors only OSError means that `out` cannot be written."""
    with _as_write_error(out, OSError), ExitStack() as staged:
        with _as_write_error(out, OSError, ValueError):
            staging = staged.enter_context(staged_folder(out, FLEET_FILE, FILES))
        yield staging


def _up_to_date(key: str, experts: int, existing: Existing, options: Options) -> Exported | None:
    """The existing fleet when this export would write the same again; None otherwise."""
    wanted = _wanted_devices(experts, options)
    same_key = existing.report.get("key") == key
    if existing.fleet is None or not same_key or not existing.intact(wanted):
        return None
    return Exported(existing.fleet, existing.report, changed=False)


def _key(source_key: str, options: Options) -> str:
    """The digest of everything that decides what an export writes."""
    data = options.recipe.data
    samples_digest = ""
    if data != "run":
        path = Path(data.removeprefix("npz:"))
        try:
            samples_digest = sha256(path.read_bytes())
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from error
    # The choice of devices does not change the contents of any folder.
    chosen = asdict(options) | {"target": target_of(options.target).name, "devices": None}
    versions = [version(package) for package in PACKAGES]
    return sha256(json.dumps([source_key, chosen, samples_digest, versions], sort_keys=True).encode())


def _wanted_devices(experts: int, options: Options) -> Collection[int]:
    """The devices to write a folder for."""
    every_device = range(experts)
    if options.devices is None:
        return every_device
    if not options.devices:
        raise SourceError(f"devices is empty; name at least one of 0 to {experts - 1}")
    unknown = sorted(set(options.devices) - set(every_device))
    if unknown:
        raise SourceError(f"there is no device {unknown[0]}; this fleet has devices 0 to {experts - 1}")
    return options.devices


def _chosen(source: Source, options: Options, progress: Progress) -> tuple[dict[str, Any], Chosen]:
    """The first part of report.json, and the graphs in the precision that was asked for."""
    # Fails on too few samples before the long work.
    samples = samples_of(source, options.recipe) if options.precision == "int8" else None
    graphs = _float_graphs(source, progress)
    target = target_of(options.target)
    if samples is not None:
        chosen = search_int8(
            source, graphs, target, options.recipe, samples, options.max_drop, options.latent, progress
        )
    elif options.precision == "fp16":
        chosen = search_fp16(source, graphs, target, options.max_drop, options.latent, progress)
    else:
        simulation = Simulation(source, graphs, options.latent)
        chosen = Chosen(simulation, dict.fromkeys(KINDS, "fp32"), source.inference)
    report = {
        "precision": options.precision,
        "onnxruntime": onnxruntime.__version__,
        "bytes_float": {f"{kind}.onnx": len(graphs.of_kind(kind)[0]) for kind in KINDS},
    }
    return report, chosen


def _float_graphs(source: Source, progress: Progress) -> Graphs:
    examples = source.inputs[:_EXAMPLES]
    extractor = export_graph(source.extractor, "extractor", torch.from_numpy(examples.copy()))
    progress("extractor exported")
    latents = torch.from_numpy(latents_of(source, extractor, examples))
    gates = _export_graphs(source.gates, "gate", source.alike, latents, progress)
    experts = _export_graphs(source.experts, "expert", source.alike, latents, progress)
    return Graphs(extractor, gates, experts)


def _export_graphs(
    nets: Sequence[torch.nn.Module], kind: str, alike: bool, latents: torch.Tensor, progress: Progress
) -> list[bytes]:
    """One graph for each module. Modules built alike are exported once; the others only replace the weights."""
    first = export_graph(nets[0], f"{kind} 0", latents)
    graphs = [first]
    for number, net in enumerate(nets[1:], 1):
        name = f"{kind} {number}"
        graph = replace_weights(first, net, name, latents) if alike else None
        graphs.append(export_graph(net, name, latents) if graph is None else graph)
    progress(f"{counted(len(graphs), kind)} exported")
    return graphs


def _write_devices(
    source: Source, chosen: Chosen, options: Options, existing: Existing, staging: Path, progress: Progress
) -> tuple[Fleet, dict[str, int]]:
    """Write the bundles; the fleet, and the size in bytes of each file of the last device."""
    experts = len(source.experts)
    wanted = _wanted_devices(experts, options)
    target = target_of(options.target).name if options.precision == "int8" else "any"
    devices = []
    sizes: dict[str, int] = {}
    for number in range(experts):
        manifest, contents = device_bundle(source, chosen, target, options.latent, number)
        name = manifest.device
        digest = manifest.seal(contents).digest
        if number in wanted or existing.has_bundle(name, digest):
            bundle = _write_verified(staging / name, existing.folder / name, manifest, contents)
            existing.link(staging / name, bundle.manifest)
        fresh = Device(name, number, f"tcp://127.0.0.1:{FIRST_PORT + number}", "0" * 64)
        devices.append(replace(existing.devices.get(name, fresh), expert=number, bundle=digest))
        sizes = {file: len(data) for file, data in contents.items()}
        progress(Count("device {} written", number + 1, experts))
    try:
        fleet = Fleet(FLEET_SCHEMA, tuple(devices))
    except ValueError as error:  # a new device has the address that an existing one was given
        raise SourceError(f"{existing.folder / FLEET_FILE}: {error} after this export; change it there") from error
    return fleet, sizes


def _write_verified(staged: Path, folder: Path, manifest: Manifest, contents: dict[str, bytes]) -> Bundle:
    """Write a bundle to `staged`, read it back and run its self-test. Errors name `folder`, its final place."""
    try:
        bundle = write_bundle(staged, manifest, contents)
        passed = run_selftest(Models(bundle), bundle).passed
    except EdgeError as error:
        raise SourceError(str(error).replace(str(staged), str(folder))) from error
    if not passed:
        raise SourceError(f"{folder}: the bundle does not pass its own self-test")
    return bundle
