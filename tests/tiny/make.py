"""Make the tiny fleet: three devices that recognise the brightest third of an image, in a few kB and without torch.

    python tests/tiny/make.py tests/tiny/fleet

The weights are written by hand, so that tests know every answer. The latent is the mean brightness of the upper,
middle and lower third and of the whole image. The gate chooses the expert of the brightest third. Expert e returns four
times the brightness of the thirds, plus 0.25 for class e, so that tests can see which expert answered.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nmoe_edge.bundle.fleet import FLEET_FILE, SCHEMA, Device, Fleet
from nmoe_edge.bundle.folder import write_bundle
from nmoe_edge.bundle.manifest import SCHEMA as MANIFEST_SCHEMA
from nmoe_edge.bundle.manifest import InputSpec, LatentSpec, Manifest, PrecisionSpec, RoutingSpec, sha256, trunk_digest
from nmoe_edge.bundle.selftest import SelfTest

DEVICES = ("attic", "barn", "cellar")
LABELS = ("top", "middle", "bottom")
SIZE = 6
LATENT = 4
OPSET = 18
IR_VERSION = 8


def model(nodes, name, dtype, row_in, row_out, weights):
    """One graph, (rows, *row_in) -> (rows, *row_out), as bytes."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("rows", dtype, ["n", *row_in])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", *row_out])],
        [numpy_helper.from_array(np.asarray(array, np.float32), key) for key, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString(deterministic=True)


def thirds():
    """(36, 4): weights from the pixels to the mean of each third and of the whole image."""
    weights = np.zeros((SIZE, SIZE, LATENT), np.float32)
    for band in range(3):
        weights[2 * band : 2 * band + 2, :, band] = 1 / 12
    weights[:, :, 3] = 1 / 36
    return weights.reshape(SIZE * SIZE, LATENT)


def extractor():
    nodes = [
        helper.make_node("Cast", ["rows"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["bright"]),
        helper.make_node("Flatten", ["bright"], ["flat"]),
        helper.make_node("MatMul", ["flat", "thirds"], ["out"]),
    ]
    weights = {"scale": 1 / 255, "thirds": thirds()}
    return model(nodes, "extractor", TensorProto.UINT8, (1, SIZE, SIZE), (LATENT,), weights)


def linear(name, factor, bias):
    """A graph from latents (rows, 4) to factor * thirds + bias (rows, 3)."""
    weights = {"w": factor * np.eye(LATENT, 3), "b": bias}
    nodes = [helper.make_node("Gemm", ["rows", "w", "b"], ["out"])]
    return model(nodes, name, TensorProto.FLOAT, (LATENT,), (3,), weights)


def images():
    """(3, 1, 6, 6): one image of each class, with its third bright."""
    made = np.full((3, 1, SIZE, SIZE), 20, np.uint8)
    for band in range(3):
        made[band, 0, 2 * band : 2 * band + 2] = 220
    return made


def bundle(expert):
    """Manifest and files of the device with this expert."""
    trunk = extractor()
    bias = 0.25 * np.eye(3)[expert]
    inputs = images()
    latents = (inputs.reshape(3, -1).astype(np.float32) / np.float32(255)) @ thirds()
    selftest = SelfTest(
        inputs=inputs,
        latents=latents,
        experts=np.arange(3).reshape(3, 1),
        outputs=(4 * latents[:, :3] + bias).astype(np.float32),
        latent_tolerance=np.array(1e-5),
        output_tolerance=np.array(1e-5),
    )
    contents = {
        "extractor.onnx": trunk,
        "gate.onnx": linear("gate", 8.0, np.zeros(3)),
        "expert.onnx": linear("expert", 4.0, bias),
        "selftest.npz": selftest.write(),
        "labels.txt": ("\n".join(LABELS) + "\n").encode(),
    }
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        device=DEVICES[expert],
        experts=3,
        expert=expert,
        outputs=3,
        answers_carry_prior=False,
        input=InputSpec("uint8", (1, SIZE, SIZE), "CHW", "stretch", (0.0, 255.0)),
        latent=LatentSpec(LATENT, "float32"),
        routing=RoutingSpec(top_k=1, combination="outputs"),
        precision=PrecisionSpec("fp32", "fp32", "fp32"),
        target="x86",
        opset=OPSET,
        ir_version=IR_VERSION,
        accuracy={"routed": 1.0},
        extractor_source=sha256(trunk),
        trunk=trunk_digest(sha256(trunk), LATENT, 3, 3),
    )
    return manifest, contents


def make_fleet(folder):
    """Write the three bundles and fleet.toml."""
    devices = []
    for expert, name in enumerate(DEVICES):
        written = write_bundle(folder / name, *bundle(expert))
        devices.append(Device(name, expert, f"tcp://127.0.0.1:{7101 + expert}", written.manifest.digest))
    (folder / FLEET_FILE).write_text(Fleet(SCHEMA, tuple(devices)).render())


if __name__ == "__main__":
    make_fleet(Path(sys.argv[1]))
