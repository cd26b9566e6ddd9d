"""Write golden samples of the run, the bundle, the fleet file and the wire in their current version.

    python tests/golden/make.py

v1/ was written by this script and must load forever, so the script refuses to overwrite it. A new version of a format
gets a new folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from edge.samples import MESSAGES, as_plain
from tiny.make import DEVICES, SIZE, bundle, images

from nmoe_edge.bundle.fleet import Device, Fleet
from nmoe_edge.bundle.folder import write_bundle
from nmoe_edge.bundle.manifest import sha256
from nmoe_edge.common.npz import write_npz
from nmoe_edge.protocol.wire import encode
from nmoe_train.nets import NetSpec, build
from nmoe_train.run import DataRecord, Inference, Networks, RunRecord, write_run

HERE = Path(__file__).parent / "v1"
DIM = 8


def write_golden_run(folder):
    """An untrained run of three clients, and the answers of its networks: the sample is about the format."""
    torch.manual_seed(20)
    networks = Networks(
        NetSpec("small", {"channels": 1, "size": SIZE, "dim": DIM, "widths": [4, 4]}),
        NetSpec("linear", {"dim": DIM, "outputs": 3}),
        NetSpec("mlp", {"dim": DIM, "outputs": 3, "widths": [8, 8, 8]}),
    )
    shape = (1, SIZE, SIZE)
    inputs = np.concatenate([images() - np.uint8(step) for step in range(4)])
    run = write_run(
        folder,
        RunRecord(
            schema=1,
            config={"note": "a sample of the format, not of training"},
            seed=20,
            data=DataRecord("bands", "0" * 64, len(inputs), "uint8", shape, "CHW"),
            networks=networks,
            latent_dim=DIM,
            experts=3,
            outputs=3,
            personal_gates=True,
            answers_carry_prior=False,
            inference=Inference(top_k=1, combination="probabilities", local_first=0.8, adapt=True),
            labels=("top", "middle", "bottom"),
        ),
        extractor=build(networks.extractor).state_dict(),
        gates=[build(networks.gate).state_dict() for _ in range(3)],
        experts=[build(networks.expert).state_dict() for _ in range(3)],
        calibration={"inputs": inputs, "labels": np.tile(np.arange(3), 4), "clients": np.tile(np.arange(3), 4)},
        metrics={"note": "untrained"},
    )
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(inputs))
        scores = [run.gate(device)(latents).numpy() for device in range(3)]
        outputs = [run.expert(device)(latents).numpy() for device in range(3)]
    answers = {"latents": latents.numpy(), "scores": np.stack(scores), "outputs": np.stack(outputs)}
    folder.with_name("run-answers.npz").write_bytes(write_npz(answers))


def write_golden():
    """Write the run, a bundle, a fleet file, encoded messages of every type, and the digests of all files."""
    write_golden_run(HERE / "run")
    written = write_bundle(HERE / "bundle", *bundle(1))
    key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    device = Device(DEVICES[1], 1, "tcp://192.0.2.7:7102", written.manifest.digest, key)
    (HERE / "fleet.toml").write_text(Fleet(1, (device,)).render())
    with (HERE / "frames.jsonl").open("w") as file:
        for message in MESSAGES:
            frames = [frame.hex() for frame in encode(message)]
            file.write(json.dumps({"message": as_plain(message), "frames": frames}) + "\n")
    files = [path for path in HERE.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(HERE)): sha256(path.read_bytes()) for path in files}
    HERE.with_suffix(".json").write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if HERE.exists():
        sys.exit(f"{HERE} exists already: golden samples are never overwritten")
    write_golden()
