"""A source -> a fleet folder: one trunk, one expert a device, one bundle each.

What is written is written through nmoe_edge's own bundle, and read back by it before it counts. What stands there
already and has not changed is not written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch

from nmoe_edge.bundle.fleet import FILES as FLEET_FILES
from nmoe_edge.bundle.fleet import FLEET_FILE, Device, Fleet, read_fleet
from nmoe_edge.bundle.fleet import SCHEMA as FLEET_SCHEMA
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.bundle.manifest import Manifest, sha256
from nmoe_edge.common.folders import check_replaceable, staged_folder
from nmoe_edge.errors import EdgeError
from nmoe_edge.models import Models, run_selftest
from nmoe_export.assignment import KINDS
from nmoe_export.bundles import Writer
from nmoe_export.calibrate import Recipe
from nmoe_export.errors import SourceError
from nmoe_export.graphs import export_graph, refilled
from nmoe_export.precision import Made, make_fp16, make_int8
from nmoe_export.progress import Count, Say
from nmoe_export.report import page
from nmoe_export.samples import samples_of
from nmoe_export.simulation import Graphs, latents_of
from nmoe_export.source import Source, key_of, of_run
from nmoe_export.targets import target_of
from nmoe_train.errors import TrainError
from nmoe_train.run import Run, read_run

FIRST_PORT = 7101
REPORT = "report.json"
PAGE = "report.html"
FILES = rf"{FLEET_FILES}|report\.(json|html)"


@dataclass(frozen=True, slots=True)
class Options:
    """What is chosen at export."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    target: str = "auto"
    recipe: Recipe = field(default_factory=Recipe)
    max_drop: float = 0.5
    """Points of accuracy that int8 or fp16 may cost."""
    latent: Literal["float16", "int8", "float32"] = "float16"
    """What latents travel as: float16 is half of float32 and a thousandth of a latent's size away from it."""
    devices: tuple[int, ...] | None = None
    """Whose folders are written; None for all. fleet.toml names every device all the same."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export leaves."""

    fleet: Fleet
    report: dict[str, Any]
    changed: bool
    """Whether anything had to be made."""


def export_run(run: Run | Path | str, out: Path, options: Options = Options(), say: Say = lambda _: None) -> Exported:
    """Write the fleet of a run to `out`: it is there as a whole, or not at all."""
    with _blamed(out):
        run = run if isinstance(run, Run) else read_run(run)
        # Before networks are built, which takes longer than all the rest of it.
        same = _unchanged(key_of(run), run.record.experts, out, options)
        if same is not None:
            return same
        source = of_run(run)
    return export_fleet(source, out, options, say)


def export_fleet(source: Source, out: Path, options: Options = Options(), say: Say = lambda _: None) -> Exported:
    """The same for any source."""
    with _blamed(out):
        same = _unchanged(source.key, len(source.experts), out, options)
        if same is not None:
            return same
        key, written, before = _key(source.key, options), _written(len(source.experts), options), _Before(out)
        check_replaceable(out, FLEET_FILE, FILES)  # before the long work
        made, report = _made(source, options, say)
        target = target_of(options.target).name if options.precision == "int8" else "any"
        writer = Writer(source, made, target, options.latent)
        with staged_folder(out, FLEET_FILE, FILES) as staging:
            devices = []
            for number in range(len(source.experts)):
                manifest, contents = writer.bundle(number)
                name, digest = manifest.device, manifest.sealed(contents).digest
                if number in written or before.holds(name, digest):
                    try:
                        bundle = write_bundle(staging / name, manifest, contents)
                        if not run_selftest(Models(bundle), bundle).passed:
                            raise SourceError(f"{name}: what was written does not pass its own self-test")
                    except EdgeError as error:
                        raise SourceError(str(error).replace(str(staging), str(out))) from error
                    before.link(staging / name, bundle.manifest)
                fresh = Device(name, number, f"tcp://127.0.0.1:{FIRST_PORT + number}", "0" * 64)
                devices.append(replace(before.devices.get(name, fresh), expert=number, bundle=digest))
                say(Count("device {} written", number + 1, len(source.experts)))
            fleet = Fleet(FLEET_SCHEMA, tuple(devices))
            report |= {"key": key, "is": made.precision, "bytes": writer.sizes}
            (staging / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
            (staging / PAGE).write_text(page(report), encoding="utf-8")
            (staging / FLEET_FILE).write_text(fleet.render())
    return Exported(fleet, report, changed=True)


@contextmanager
def _blamed(out: Path) -> Iterator[None]:
    """What goes wrong, as one line."""
    try:
        yield
    except (TrainError, EdgeError) as error:
        raise SourceError(str(error)) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{out}: cannot be written: {error}") from error


def _unchanged(source_key: str, experts: int, out: Path, options: Options) -> Exported | None:
    """What stands there, where it is what this export would write."""
    before, written = _Before(out), _written(experts, options)
    if before.fleet is None or before.report.get("key") != _key(source_key, options) or not before.intact(written):
        return None
    return Exported(before.fleet, before.report, changed=False)


def _key(source_key: str, options: Options) -> str:
    """Digest of everything that an export depends on."""
    data, shown = options.recipe.data, ""
    if data != "run":
        try:
            shown = sha256(Path(data.removeprefix("npz:")).read_bytes())
        except OSError as error:
            raise SourceError(f"{data.removeprefix('npz:')}: {error.strerror}") from error
    packages = ("nmoe", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    # Which folders are written changes nothing in any of them.
    chosen = asdict(options) | {"target": target_of(options.target).name, "devices": None}
    return sha256(json.dumps([source_key, chosen, shown, [version(p) for p in packages]], sort_keys=True).encode())


def _written(experts: int, options: Options) -> Collection[int]:
    """The devices whose folders are asked for."""
    everybody = range(experts)
    if options.devices is None:
        return everybody
    unknown = sorted(set(options.devices) - set(everybody))
    if unknown or not options.devices:
        what = f"no device {unknown[0]}" if unknown else "no device is named"
        raise SourceError(f"{what}: there are 0 to {len(everybody) - 1}")
    return options.devices


class _Before:
    """What stands at the fleet's place already."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.fleet = read_fleet(out / FLEET_FILE) if (out / FLEET_FILE).exists() else None
        self.devices = {device.name: device for device in self.fleet.device} if self.fleet else {}
        """Somebody chose their addresses and keys, so they are kept."""
        self.report: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # without a report that can be read, everything is made anew
            report = json.loads((out / REPORT).read_bytes())
            self.report = report if isinstance(report, dict) else {}
        self._known: dict[str, Path] = {}

    def intact(self, written: Collection[int]) -> bool:
        """Whether the bundles of these devices, and whatever else is here, are byte for byte as the fleet says."""
        due = [d for d in self.devices.values() if d.expert in written or os.path.lexists(self._out / d.name)]
        return all(self.holds(device.name, device.bundle) for device in due)

    def holds(self, name: str, digest: str) -> bool:
        """Whether the very bundle of this digest is here."""
        try:
            return read_bundle(self._out / name).manifest.digest == digest
        except EdgeError:
            return False

    def link(self, folder: Path, manifest: Manifest) -> None:
        """Let files of a device that others have too, or that it had before, be one file on the disk."""
        for name, entry in manifest.files.items():
            path, old = folder / name, self._out / folder.name / name
            twin = self._known.setdefault(entry.sha256, path)
            same = old.is_file() and not old.is_symlink() and old.stat().st_mode == path.stat().st_mode
            if twin is path and same and sha256(old.read_bytes()) == entry.sha256:
                twin = old
            if twin is not path:
                staged = path.with_name(f"{name}.link")
                with suppress(OSError):  # a file system without links keeps copies
                    os.link(twin, staged)
                    staged.replace(path)


def _made(source: Source, options: Options, say: Say) -> tuple[Made, dict[str, Any]]:
    """The graphs in the precision that was asked for, and what is to be reported."""
    # Too few samples are known before the long work.
    samples = samples_of(source, options.recipe) if options.precision == "int8" else None
    example = torch.from_numpy(source.inputs[:32].copy())
    extractor = export_graph(source.extractor, "extractor", example)
    say("extractor exported")
    latents = torch.from_numpy(latents_of(source, extractor, source.inputs[:32]))
    graphs = Graphs(
        extractor,
        _exported(source.gates, "gate", source.alike, latents, say),
        _exported(source.experts, "expert", source.alike, latents, say),
    )
    sizes = {"extractor.onnx": len(extractor), "gate.onnx": len(graphs.gates[0]), "expert.onnx": len(graphs.experts[0])}
    head = {"precision": options.precision, "onnxruntime": onnxruntime.__version__, "bytes_float": sizes}
    target = target_of(options.target)
    if samples is not None:
        made = make_int8(source, graphs, target, options.recipe, samples, options.max_drop, options.latent, say)
    elif options.precision == "fp16":
        made = make_fp16(source, graphs, target, options.max_drop, options.latent, say)
    else:
        made = Made(graphs, dict.fromkeys(KINDS, "fp32"), source.inference)
    return made, head | made.report


def _exported(nets: Sequence[torch.nn.Module], name: str, alike: bool, latents: torch.Tensor, say: Say) -> list[bytes]:
    """A graph for each: exported once, and filled with the others' weights where they are alike."""
    graphs = [export_graph(nets[0], f"{name} 0", latents)]
    for i, net in enumerate(nets[1:], 1):
        again = refilled(graphs[0], net, f"{name} {i}", latents) if alike else None
        graphs.append(again if again is not None else export_graph(net, f"{name} {i}", latents))
    say(f"{len(graphs)} {name}{'s' * (len(graphs) > 1)} exported")
    return graphs
