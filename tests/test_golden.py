"""Files of every version must load forever. The samples are never changed, whatever changes in the code."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from edge.samples import as_plain

from nmoe_edge.bundle.fleet import read_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.common.npz import read_npz
from nmoe_edge.models import Models, run_selftest
from nmoe_edge.protocol.wire import decode, encode


@pytest.fixture
def golden_2(golden):
    """The folder of samples of every format that has a version 2."""
    return golden.with_name("v2")


def test_the_bundle_of_version_1_loads_and_gives_the_same_answers(golden):
    bundle = read_bundle(golden / "bundle")
    assert bundle.labels == ("top", "middle", "bottom")
    assert run_selftest(Models(bundle), bundle).passed


def test_the_bundle_of_version_1_tests_no_latents(golden):
    bundle = read_bundle(golden / "bundle")
    assert (bundle.manifest.schema, bundle.manifest.routing.familiar, bundle.familiar) == (1, None, None)


def test_the_bundle_of_version_2_loads_and_gives_the_same_answers(golden_2):
    bundle = read_bundle(golden_2 / "bundle")
    assert run_selftest(Models(bundle), bundle).passed
    routing = bundle.manifest.routing
    assert (bundle.manifest.schema, routing.local_first, routing.adapt, routing.familiar) == (2, 0.9, True, 2.5)
    latents = np.array([[0.25, 0, 0, 9], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32)
    assert bundle.familiar.distances(latents).tolist() == [0, 1, 1]


def test_the_fleet_of_version_1_loads(golden):
    (device,) = read_fleet(golden / "fleet.toml").device
    assert device.bundle == read_bundle(golden / "bundle").manifest.digest


def test_the_frames_of_version_1_are_decoded_and_encoded_unchanged(golden):
    lines = (golden / "frames.jsonl").read_text().splitlines()
    assert len(lines) >= 12
    for line in lines:
        sample = json.loads(line)
        frames = tuple(bytes.fromhex(frame) for frame in sample["frames"])
        message = decode(frames)
        assert json.loads(json.dumps(as_plain(message))) == sample["message"]
        assert encode(message) == frames


def test_the_run_of_version_1_loads_and_gives_the_same_answers(golden):
    torch = pytest.importorskip("torch")
    from nmoe_train.run import read_run

    run = read_run(golden / "run")
    expected = read_npz((golden / "run-answers.npz").read_bytes())
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(run.calibration()["inputs"].copy()))
        assert np.allclose(latents, expected["latents"], atol=1e-5)
        for device in range(3):
            assert np.allclose(run.gate(device)(latents), expected["scores"][device], atol=1e-5)
            assert np.allclose(run.expert(device)(latents), expected["outputs"][device], atol=1e-5)


def test_the_run_of_version_1_is_not_calibrated_and_tests_no_latents(golden):
    torch = pytest.importorskip("torch")
    from nmoe_train.run import read_run

    run = read_run(golden / "run")
    latents = torch.ones(2, 8)
    assert run.record.inference.familiar is None
    assert run.familiar(0) is None
    assert run.statistics() == []
    with torch.no_grad():
        assert torch.equal(run.calibrated_expert(1)(latents), run.expert(1)(latents))


def test_the_run_of_version_2_loads_and_gives_the_same_answers(golden_2):
    torch = pytest.importorskip("torch")
    from nmoe_train.run import read_run

    run = read_run(golden_2 / "run")
    expected = read_npz((golden_2 / "run-answers.npz").read_bytes())
    latents = torch.from_numpy(expected["latents"].copy())
    assert (run.record.schema, run.record.inference.familiar) == (2, 9.0)
    with torch.no_grad():
        found = {
            "extracted": run.extractor()(torch.from_numpy(run.calibration()["inputs"].copy())),
            "latents": latents,
            "scores": run.gate(0)(latents),
            "outputs": np.stack([run.expert(i)(latents) for i in range(3)]),
            "calibrated": np.stack([run.calibrated_expert(i)(latents) for i in range(3)]),
            "head": run.calibrated_head(0)(latents),
            "distances": np.stack([run.familiar(i).distances(latents.numpy()) for i in range(3)]),
            "means": np.stack([one.means for one in run.statistics()]),
        }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.allclose(found[name], array, rtol=1e-4, atol=1e-4), name
    scale = np.array([0.5, 1, 2])[:, None, None]
    bias = np.array([[0, 1, -1], [0, 0, 0], [0.5, 0, 0]])[:, None]
    assert np.allclose(expected["calibrated"], expected["outputs"] * scale + bias, atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_no_sample_was_changed(golden, version):
    folder = golden.with_name(version)
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == json.loads(folder.with_suffix(".json").read_text())
