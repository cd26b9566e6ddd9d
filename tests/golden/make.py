"""Write golden samples of the formats that have a version 2: the run and the bundle.

    python tests/golden/make.py

v1/ has a sample of every format in version 1; the script that wrote it is in the history. All samples must load
forever, so this script never overwrites one. A new version of a format gets a new folder; the fleet file and the wire
are still at version 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny.make import SIZE, bundle, images

from nmoe_edge.bundle.folder import write_bundle
from nmoe_edge.bundle.manifest import sha256
from nmoe_edge.bundle.statistics import write_statistics
from nmoe_edge.common.npz import write_npz
from nmoe_edge.protocol.familiar import Familiar
from nmoe_train.config import GateConfig
from nmoe_train.nets import NetSpec, build
from nmoe_train.run import DataRecord, Inference, Networks, RunRecord, write_run
from nmoe_train.stages.calibration import Calibration
from nmoe_train.stages.familiarity import familiar_latents
from nmoe_train.stages.statgate import assemble, network
from nmoe_train.stages.statistics import client_statistics

HERE = Path(__file__).parent / "v2"
FAMILIAR = Familiar(
    np.array([[4, 0], [0, 4], [1, 1], [0, 0]], np.float32),
    np.array([[1, 0], [0, 3], [-2, 0.5]], np.float32),
)


def write_golden_bundle(folder):
    """A bundle of the tiny fleet that adapts and tests whether latents are familiar."""
    manifest, contents = bundle(1)
    routing = replace(manifest.routing, combination="probabilities", local_first=0.9, adapt=True, familiar=2.5)
    write_bundle(folder, replace(manifest, routing=routing), {**contents, "familiar.npz": write_statistics(FAMILIAR)})


DIM = 8


def write_golden_run(folder):
    """An untrained run of three clients with everything that schema 2 has, and what it computes."""
    torch.manual_seed(21)
    images_net = NetSpec("small", {"channels": 1, "size": SIZE, "dim": DIM, "widths": [4, 4]})
    inputs = np.concatenate([images() - np.uint8(step) for step in range(4)])
    labels = np.tile(np.arange(3), 4)
    extractor = build(images_net)
    drawn = np.random.default_rng(21)
    y = torch.from_numpy(np.tile(np.arange(3), 20))
    clients = [torch.from_numpy(drawn.normal(0, 1 + i, (60, DIM)).astype(np.float32)) + y[:, None] for i in range(3)]
    latents = torch.from_numpy(drawn.normal(0, 2, (9, DIM)).astype(np.float32))
    gate = GateConfig(method="statgate", statistics="means")
    published = [client_statistics(h, y, 3, gate, 21, i) for i, h in enumerate(clients)]
    networks = Networks(
        images_net,
        network(published, gate),
        NetSpec("mlp", {"dim": DIM, "outputs": 3, "widths": [8, 8, 8]}),
        NetSpec("linear", {"dim": DIM, "outputs": 3}),
    )
    run = write_run(
        folder,
        RunRecord(
            schema=2,
            config={"note": "a sample of the format, not of training"},
            seed=21,
            data=DataRecord("bands", "0" * 64, len(inputs), "uint8", (1, SIZE, SIZE), "CHW"),
            networks=networks,
            latent_dim=DIM,
            experts=3,
            outputs=3,
            personal_gates=False,
            answers_carry_prior=False,
            inference=Inference(1, "probabilities", local_first=0.8, adapt=True, familiar=9.0),
            labels=("top", "middle", "bottom"),
        ),
        extractor=extractor.state_dict(),
        gates=[assemble(published, gate)],
        experts=[build(networks.expert).state_dict() for _ in range(3)],
        heads=[build(networks.head).state_dict()],
        corrections=Calibration(
            np.array([0.5, 1, 2], np.float32), np.array([[0, 1, -1], [0, 0, 0], [0.5, 0, 0]], np.float32)
        ),
        head_correction=Calibration(np.array([0.75], np.float32), np.array([[0, 0, 0.25]], np.float32)),
        familiar=[familiar_latents(h.numpy(), y.numpy()) for h in clients],
        statistics=published,
        calibration={"inputs": inputs, "labels": labels, "clients": labels},
        metrics={"note": "untrained"},
    )
    with torch.no_grad():
        answers = {
            "extracted": run.extractor()(torch.from_numpy(inputs)).numpy(),
            "latents": latents.numpy(),
            "scores": run.gate(0)(latents).numpy(),
            "outputs": np.stack([run.expert(i)(latents).numpy() for i in range(3)]),
            "calibrated": np.stack([run.calibrated_expert(i)(latents).numpy() for i in range(3)]),
            "head": run.calibrated_head(0)(latents).numpy(),
            "distances": np.stack([run.familiar(i).distances(latents.numpy()) for i in range(3)]),
            "means": np.stack([one.means.numpy() for one in run.statistics()]),
        }
    folder.with_name("run-answers.npz").write_bytes(write_npz(answers))


PARTS = {"bundle": write_golden_bundle, "run": write_golden_run}
"""Name of a sample -> what writes it."""


def write_golden():
    """Write the samples that do not exist yet, and the digests of all files."""
    missing = [name for name in PARTS if not (HERE / name).exists()]
    for name in missing:
        PARTS[name](HERE / name)
    files = [path for path in HERE.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(HERE)): sha256(path.read_bytes()) for path in files}
    HERE.with_suffix(".json").write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")
    print(f"wrote {', '.join(missing) or 'nothing: every sample exists'}")


if __name__ == "__main__":
    write_golden()
