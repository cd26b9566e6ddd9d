"""A run -> a fleet folder: one trunk, one expert a device, one bundle each.

Float32 so far. What is written is written through nmoe_edge's own bundle, and read back by it before it counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nmoe_edge.bundle import SelfTest, write_bundle
from nmoe_edge.errors import EdgeError
from nmoe_edge.fleet import FILES as FLEET_FILES
from nmoe_edge.fleet import FLEET_FILE, Device, Fleet, read_fleet
from nmoe_edge.fleet import SCHEMA as FLEET_SCHEMA
from nmoe_edge.folders import staged_folder
from nmoe_edge.manifest import SCHEMA, InputSpec, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, sha256, trunk_digest
from nmoe_edge.models import Graph
from nmoe_edge.protocol.combine import combine, expert_weights
from nmoe_edge.protocol.routing import route
from nmoe_export.errors import SourceError
from nmoe_export.graphs import IR_VERSION, OPSET, export_graph
from nmoe_train.errors import TrainError
from nmoe_train.run import Run, RunRecord, read_run

FIRST_PORT = 7101
SELFTEST_ROWS = 8
LATENT_DTYPE: Literal["float16"] = "float16"
"""On the wire: half the bytes of float32, and a thousandth of a latent's size away from it."""
TOLERANCE = 1e-3
"""What another CPU may differ by, of the largest number in the self-test: float32 sums in another order give 1e-6."""


def export_run(run: Run | Path, out: Path, progress: Callable[[str], None] = lambda _: None) -> Fleet:
    """Write the fleet of a run to `out`: it is there as a whole, or not at all."""
    try:
        run = run if isinstance(run, Run) else read_run(run)
        inputs, labels = _held_out(run)
        source = _Source(run, inputs, progress)
        before = _devices_before(out)
        with staged_folder(out, FLEET_FILE, FLEET_FILES) as staging:
            devices = []
            for number in range(run.record.experts):
                manifest, contents = source.bundle(number, inputs, labels)
                try:
                    bundle = write_bundle(staging / manifest.device, manifest, contents)
                except EdgeError as error:
                    raise SourceError(str(error).replace(str(staging), str(out))) from error
                fresh = Device(manifest.device, number, f"tcp://127.0.0.1:{FIRST_PORT + number}", "0" * 64)
                devices.append(
                    replace(before.get(manifest.device, fresh), expert=number, bundle=bundle.manifest.digest)
                )
                progress(f"{manifest.device} written")
            fleet = Fleet(FLEET_SCHEMA, tuple(devices))
            (staging / FLEET_FILE).write_text(fleet.render())
    except (TrainError, EdgeError) as error:
        raise SourceError(str(error)) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{out}: cannot be written: {error}") from error
    return fleet


def _devices_before(out: Path) -> dict[str, Device]:
    """The devices of the fleet that stands there already: somebody chose their addresses and keys, so they are kept."""
    if not (out / FLEET_FILE).exists():
        return {}
    return {device.name: device for device in read_fleet(out / FLEET_FILE).device}


def _held_out(run: Run) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The run's calibration samples: inputs (n, …) and, where they are known, labels (n,)."""
    arrays = run.calibration()
    return arrays["inputs"], arrays.get("labels")


def _extractor_source(record: RunRecord) -> str:
    """The extractor as it was trained: how it is built, and its weights."""
    net = record.networks.extractor
    weights = record.files["extractor.safetensors"].sha256
    return sha256(json.dumps([net.factory, dict(net.arguments), weights], sort_keys=True).encode())


class _Source:
    """The graphs of a run: the trunk made once, gate and expert for each device."""

    def __init__(self, run: Run, inputs: NDArray[Any], progress: Callable[[str], None]) -> None:
        self.run, self.progress = run, progress
        self.extractor = export_graph(run.extractor(), "extractor", torch.from_numpy(inputs[:32].copy()))
        progress("extractor exported")
        latent = (run.record.latent_dim,)
        self.latents = Graph("extractor", self.extractor, run.record.data.shape, latent)(inputs)
        self._example = torch.from_numpy(self.latents[:32].copy())
        self.experts = [self._export(run.expert(i), f"expert {i}") for i in range(run.record.experts)]
        owners = run.record.experts if run.record.personal_gates else 1
        self.gates = [self._export(run.gate(i), f"gate {i}") for i in range(owners)]
        self.outputs = [
            Graph(f"expert {i}", graph, latent, (run.record.outputs,))(self.latents)
            for i, graph in enumerate(self.experts)
        ]

    def _export(self, module: torch.nn.Module, name: str) -> bytes:
        graph = export_graph(module, name, self._example)
        self.progress(f"{name} exported")
        return graph

    def bundle(
        self, number: int, inputs: NDArray[Any], labels: NDArray[Any] | None
    ) -> tuple[Manifest, dict[str, bytes]]:
        """A device's manifest and files."""
        record = self.run.record
        gate = self.gates[number if record.personal_gates else 0]
        scores = Graph("gate", gate, (record.latent_dim,), (record.experts,))(self.latents)
        contents = {
            "extractor.onnx": self.extractor,
            "gate.onnx": gate,
            "expert.onnx": self.experts[number],
            "selftest.npz": self._selftest(number, inputs, scores).write(),
        }
        if record.labels is not None:
            contents["labels.txt"] = ("\n".join(record.labels) + "\n").encode()
        source, inference = _extractor_source(record), record.inference
        manifest = Manifest(
            schema=SCHEMA,
            device=f"device-{number:02}",
            experts=record.experts,
            expert=number,
            outputs=record.outputs,
            answers_carry_prior=record.answers_carry_prior,
            input=InputSpec(
                record.data.dtype,
                record.data.shape,
                record.data.layout,
                "exact" if record.data.layout == "none" else "stretch",
                (0.0, 255.0) if record.data.dtype == "uint8" else (float(inputs.min()), float(inputs.max()) + 1e-6),
            ),
            latent=LatentSpec(record.latent_dim, LATENT_DTYPE),
            routing=RoutingSpec(inference.top_k, inference.combination, inference.local_first, inference.adapt),
            precision=PrecisionSpec("fp32", "fp32", "fp32"),
            target="any",
            opset=OPSET,
            ir_version=IR_VERSION,
            accuracy={} if labels is None else {"held_out": self._accuracy(number, scores, labels)},
            extractor_source=source,
            trunk=trunk_digest(source, record.latent_dim, record.experts, record.outputs),
        )
        return manifest, contents

    def _selftest(self, number: int, inputs: NDArray[Any], scores: NDArray[np.float32]) -> SelfTest:
        """The rows whose route is the clearest: another CPU's last bit must not choose another expert."""
        top_k, experts = self.run.record.inference.top_k, scores.shape[1]
        ranked = -np.sort(-scores, axis=1)[:, : top_k + 1]
        margin = (ranked[:, :-1] - ranked[:, 1:]).min(axis=1, initial=np.inf)  # of the order as well as of the choice
        rows = np.argsort(-margin, kind="stable")[:SELFTEST_ROWS]
        chosen = route(scores[rows], number, range(experts), top_k).chosen
        latents, outputs = self.latents[rows], self.outputs[number][rows]
        return SelfTest(
            inputs[rows],
            latents,
            np.array(chosen, np.int64),
            outputs,
            np.array(TOLERANCE * max(1.0, float(np.abs(latents).max()))),
            np.array(TOLERANCE * max(1.0, float(np.abs(outputs).max()))),
        )

    def _accuracy(self, number: int, scores: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """Share of the held-out samples that this device's gate and the experts it chooses get right."""
        inference = self.run.record.inference
        right = 0
        for row, experts in enumerate(route(scores, number, range(len(self.experts)), inference.top_k).chosen):
            answers = {expert: self.outputs[expert][row] for expert in experts}
            weights = expert_weights(scores[row], experts)
            right += int(combine(answers, weights, inference.combination).argmax() == labels[row])
        return right / len(labels)
