"""A source -> a fleet folder: one trunk, one expert a device, one bundle each.

What is written is written through nmoe_edge's own bundle, and read back by it before it counts. What stands there
already and has not changed is not written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from nmoe_edge.bundle import SelfTest, read_bundle, write_bundle
from nmoe_edge.errors import EdgeError
from nmoe_edge.fleet import FILES as FLEET_FILES
from nmoe_edge.fleet import FLEET_FILE, Device, Fleet, read_fleet
from nmoe_edge.fleet import SCHEMA as FLEET_SCHEMA
from nmoe_edge.folders import check_replaceable, staged_folder
from nmoe_edge.manifest import SCHEMA, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, sha256, trunk_digest
from nmoe_edge.models import Graph, Models, run_selftest
from nmoe_edge.npz import read_npz
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.routing import route
from nmoe_export.calibrate import Recipe, drawn
from nmoe_export.errors import SourceError
from nmoe_export.graphs import IR_VERSION, OPSET, export_graph, refilled
from nmoe_export.precision import Made, make_int8
from nmoe_export.report import page
from nmoe_export.source import Say, Source, of_run
from nmoe_export.system import Graphs, System, latents_of
from nmoe_export.targets import target_of
from nmoe_train.errors import TrainError
from nmoe_train.run import Run, read_run

FIRST_PORT = 7101
SELFTEST_ROWS = 8
TOLERANCES = {"fp32": 1e-3, "int8": 2e-2}
"""What another CPU may differ by, of the largest number in the self-test: float32 sums in another order give 1e-6, an
int8 step that is rounded the other way a part in 127."""
REPORT = "report.json"
PAGE = "report.html"
FILES = rf"{FLEET_FILES}|report\.(json|html)"


@dataclass(frozen=True, slots=True)
class Options:
    """What is chosen at export."""

    precision: Literal["fp32", "int8"] = "fp32"
    target: str = "auto"
    recipe: Recipe = field(default_factory=Recipe)
    max_drop: float = 0.5
    """Points of accuracy that int8 may cost."""
    latent: Literal["float16", "int8", "float32"] = "float16"
    """What latents travel as: float16 is half of float32 and a thousandth of a latent's size away from it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export leaves."""

    fleet: Fleet
    report: dict[str, Any]
    changed: bool
    """Whether anything had to be made."""


def export_run(run: Run | Path | str, out: Path, options: Options = Options(), say: Say = lambda _: None) -> Exported:
    """Write the fleet of a run to `out`: it is there as a whole, or not at all."""
    try:
        source = of_run(run if isinstance(run, Run) else read_run(run))
    except TrainError as error:
        raise SourceError(str(error)) from error
    return export_fleet(source, out, options, say)


def export_fleet(source: Source, out: Path, options: Options = Options(), say: Say = lambda _: None) -> Exported:
    """The same for any source."""
    try:
        key = _key(source, options)
        before = _Before(out)
        if before.fleet is not None and before.report.get("key") == key and before.intact():
            return Exported(before.fleet, before.report, changed=False)
        check_replaceable(out, FLEET_FILE, FILES)  # before the long work
        made, report = _made(source, options, say)
        writer = _Writer(source, made, options)
        with staged_folder(out, FLEET_FILE, FILES) as staging:
            devices = []
            for number in range(len(source.experts)):
                manifest, contents = writer.bundle(number)
                try:
                    bundle = write_bundle(staging / manifest.device, manifest, contents)
                    if not run_selftest(Models(bundle), bundle).passed:
                        raise SourceError(f"{manifest.device}: what was written does not pass its own self-test")
                except EdgeError as error:
                    raise SourceError(str(error).replace(str(staging), str(out))) from error
                before.link(staging / manifest.device, bundle.manifest)
                fresh = Device(manifest.device, number, f"tcp://127.0.0.1:{FIRST_PORT + number}", "0" * 64)
                device = before.devices.get(manifest.device, fresh)
                devices.append(replace(device, expert=number, bundle=bundle.manifest.digest))
                say(f"device {number + 1} of {len(source.experts)} written")
            fleet = Fleet(FLEET_SCHEMA, tuple(devices))
            report |= {"key": key, "is": made.precision, "bytes": writer.sizes}
            (staging / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
            (staging / PAGE).write_text(page(report), encoding="utf-8")
            (staging / FLEET_FILE).write_text(fleet.render())
    except (TrainError, EdgeError) as error:
        raise SourceError(str(error)) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{out}: cannot be written: {error}") from error
    return Exported(fleet, report, changed=True)


def _key(source: Source, options: Options) -> str:
    """Digest of everything that an export depends on."""
    data = options.recipe.data
    shown = sha256(Path(data.removeprefix("npz:")).read_bytes()) if data.startswith("npz:") else ""
    packages = ("nmoe", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    chosen = asdict(options) | {"target": target_of(options.target).name}
    return sha256(json.dumps([source.key, chosen, shown, [version(p) for p in packages]], sort_keys=True).encode())


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

    def intact(self) -> bool:
        """Whether every bundle is byte for byte as its manifest, and its manifest as the fleet, says."""
        try:
            return all(read_bundle(self._out / d.name).manifest.digest == d.bundle for d in self.devices.values())
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
    samples = _samples(source, options.recipe) if options.precision == "int8" else source.inputs
    if options.precision == "int8":
        drawn(samples, options.recipe)  # too few are known before the long work
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
    if options.precision == "fp32":
        return Made(graphs, dict.fromkeys(("extractor", "gate", "expert"), "fp32"), source.inference), head
    made = make_int8(
        source,
        graphs,
        target_of(options.target),
        options.recipe,
        samples,
        options.max_drop,
        options.latent,
        say,
    )
    return made, head | made.report


def _samples(source: Source, recipe: Recipe) -> NDArray[Any]:
    """What is calibrated on."""
    if recipe.data == "run":
        return source.inputs
    path = Path(recipe.data.removeprefix("npz:"))
    try:
        inputs = read_npz(path.read_bytes())["inputs"]
    except KeyError:
        raise SourceError(f"{path}: holds no array called inputs") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {error}") from error
    if (inputs.dtype.name, inputs.shape[1:]) != (source.input.dtype, source.input.shape):
        raise SourceError(
            f"{path}: inputs are {inputs.dtype} {inputs.shape[1:]}, not {source.input.dtype} {source.input.shape}"
        )
    return inputs


def _exported(nets: Sequence[torch.nn.Module], name: str, alike: bool, latents: torch.Tensor, say: Say) -> list[bytes]:
    """A graph for each: exported once, and filled with the others' weights where they are alike."""
    graphs = [export_graph(nets[0], f"{name} 0", latents)]
    for i, net in enumerate(nets[1:], 1):
        again = refilled(graphs[0], net, f"{name} {i}", latents) if alike else None
        graphs.append(again if again is not None else export_graph(net, f"{name} {i}", latents))
    say(f"{len(graphs)} {name}{'s' * (len(graphs) > 1)} exported")
    return graphs


class _Writer:
    """Manifests and files of each device."""

    def __init__(self, source: Source, made: Made, options: Options) -> None:
        self.source, self.made, self.options = source, made, options
        self.system = System(source, made.graphs, options.latent)
        target = target_of(options.target).name if options.precision == "int8" else "any"
        self.target = target
        self.sizes: dict[str, int] = {}

    def bundle(self, number: int) -> tuple[Manifest, dict[str, bytes]]:
        """A device's manifest and files."""
        source, graphs, rules = self.source, self.made.graphs, self.made.rules
        contents = {
            "extractor.onnx": graphs.extractor,
            "gate.onnx": graphs.gates[number % len(graphs.gates)],
            "expert.onnx": graphs.experts[number],
            "selftest.npz": self._selftest(number).write(),
        }
        if source.names is not None:
            contents["labels.txt"] = ("\n".join(source.names) + "\n").encode()
        self.sizes = {name: len(data) for name, data in contents.items()}
        experts = len(source.experts)
        manifest = Manifest(
            schema=SCHEMA,
            device=f"device-{number:02}",
            experts=experts,
            expert=number,
            outputs=source.outputs,
            answers_carry_prior=source.answers_carry_prior,
            input=source.input,
            latent=LatentSpec(source.latent_dim, self.options.latent),
            routing=RoutingSpec(rules.top_k, rules.combination, rules.local_first, rules.adapt),
            precision=PrecisionSpec(**self.made.precision),  # type: ignore[arg-type]  # fp32 and int8
            target=self.target,
            opset=OPSET,
            ir_version=IR_VERSION,
            accuracy={} if source.labels is None else {"held_out": self._accuracy(number, source.labels)},
            extractor_source=source.extractor_source,
            trunk=trunk_digest(source.extractor_source, source.latent_dim, experts, source.outputs),
        )
        return manifest, contents

    def _selftest(self, number: int) -> SelfTest:
        """The rows whose route is the clearest: another CPU's last bit must not choose another expert."""
        system, scores = self.system, self.system.scores[number % len(self.system.scores)]
        top_k, experts = self.made.rules.top_k, scores.shape[1]
        ranked = -np.sort(-scores, axis=1)[:, : top_k + 1]
        margin = (ranked[:, :-1] - ranked[:, 1:]).min(axis=1, initial=np.inf)  # of the order as well as of the choice
        rows = np.argsort(-margin, kind="stable")[:SELFTEST_ROWS]
        chosen = route(scores[rows], number, range(experts), top_k).chosen
        latents = system.latents[rows]
        expert = Graph("expert", self.made.graphs.experts[number], (self.source.latent_dim,), (self.source.outputs,))
        outputs = expert(latents)  # of the latents themselves, not as they travel
        loosest = TOLERANCES["int8" if "int8" in self.made.precision.values() else "fp32"]
        return SelfTest(
            self.source.inputs[rows],
            latents,
            np.array(chosen, np.int64),
            outputs,
            np.array(loosest * max(1.0, float(np.abs(latents).max()))),
            np.array(loosest * max(1.0, float(np.abs(outputs).max()))),
        )

    def _accuracy(self, number: int, labels: NDArray[Any]) -> float:
        """Share of the held-out samples that this device's gate and the experts it chooses get right."""
        rules, scores = self.made.rules, self.system.scores[number % len(self.system.scores)]
        right = 0
        for row, experts in enumerate(route(scores, number, range(scores.shape[1]), rules.top_k).chosen):
            answers = {expert: self.system.outputs[row, expert] for expert in experts}
            weights = expert_weights(scores[row], experts)
            right += int(combine(answers, weights, rules.combination).argmax() == labels[row])
        return right / len(labels)
