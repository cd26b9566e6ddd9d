"""Graphs in onnxruntime, and the self-test of a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from nmoe_edge import models
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.errors import ModelError
from nmoe_edge.models import Graph, Models, run_selftest


@pytest.fixture
def bundle(tiny_fleet):
    return read_bundle(tiny_fleet / "barn")


def test_an_image_becomes_a_latent_a_route_and_an_answer(bundle):
    models = Models(bundle)
    image = np.zeros((1, 1, 6, 6), np.uint8)
    image[0, 0, 2:4] = 255  # the middle third
    latents = models.extractor(image)
    assert latents == pytest.approx(np.array([[0, 1, 0, 1 / 3]]), abs=1e-6)
    assert models.gate(latents) == pytest.approx(np.array([[0, 8, 0]]), abs=1e-5)
    assert models.expert(latents) == pytest.approx(np.array([[0, 4.25, 0]]), abs=1e-5)


def test_a_graph_takes_any_number_of_rows(bundle):
    extractor = Models(bundle, threads=2).extractor
    for rows in (1, 2, 33):
        assert extractor(np.zeros((rows, 1, 6, 6), np.uint8)).shape == (rows, 4)


def test_the_selftest_passes_on_equal_answers(bundle):
    result = run_selftest(Models(bundle), bundle)
    assert result.passed
    assert (result.rows, result.other_choices) == (3, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda test: {"latents": test.latents + np.float32(0.1)},
        lambda test: {"outputs": test.outputs + np.float32(0.1)},
        lambda test: {"experts": np.roll(test.experts, 1, axis=0)},
    ],
    ids=["latents", "outputs", "experts"],
)
def test_the_selftest_fails_on_different_answers(bundle, change):
    other = replace(bundle, selftest=replace(bundle.selftest, **change(bundle.selftest)))
    assert not run_selftest(Models(bundle), other).passed


def test_rows_of_another_shape_raise_a_model_error(bundle):
    with pytest.raises(ModelError, match=r"extractor\.onnx: .*[Ii]nvalid"):
        Models(bundle).extractor(np.zeros((1, 1, 5, 6), np.uint8))


def test_a_session_does_not_keep_the_bytes_of_its_file(bundle):
    data = bundle.contents["extractor.onnx"]
    known = sys.getrefcount(data)
    extractor = Graph("extractor.onnx", data, (1, 6, 6), (4,))
    assert sys.getrefcount(data) == known
    assert extractor(np.zeros((1, 1, 6, 6), np.uint8)).shape == (1, 4)


def test_a_graph_that_onnxruntime_refuses_is_a_one_line_error(bundle):
    with pytest.raises(ModelError, match="onnxruntime .* refuses it") as refused:
        Graph("gate.onnx", b"\x08\x08", (4,), (3,))
    assert "\n" not in str(refused.value)


def test_a_graph_with_a_fixed_number_of_rows_is_refused(bundle):
    # Replace dim { dim_param: "n" } of the input by dim { dim_value: 1 }, padded to the same length.
    data = bundle.contents["gate.onnx"]
    at = data.index(b"\n\x03\x12\x01n")
    fixed = data[:at] + b"\n\x03\x08\x81\x00" + data[at + 5 :]
    with pytest.raises(ModelError, match="a fixed number of rows"):
        Graph("gate.onnx", fixed, (4,), (3,))


def test_an_extractor_with_another_input_dtype_than_the_manifest_is_refused(bundle):
    other = replace(bundle.manifest, input=replace(bundle.manifest.input, dtype="int64"))
    with pytest.raises(ModelError, match="takes uint8, the manifest says int64"):
        Models(replace(bundle, manifest=other))


@pytest.mark.parametrize(("row_in", "row_out"), [((5,), (3,)), ((4,), (2,)), ((4, 1), (3,))])
def test_a_graph_with_other_shapes_than_the_manifest_is_refused(bundle, row_in, row_out):
    with pytest.raises(ModelError, match="the manifest says"):
        Graph("gate.onnx", bundle.contents["gate.onnx"], row_in, row_out)


def test_auto_uses_the_next_provider_when_one_fails(tiny_fleet, monkeypatch):
    """As with a GPU build of onnxruntime on a machine without a GPU."""
    bundle = read_bundle(tiny_fleet / "attic")
    tried = []

    class Picky(models.Graph):
        def __init__(self, name, data, row_in, row_out, threads=1, provider=models.CPU):
            tried.append(provider)
            if provider == models.PROVIDERS["cuda"]:
                raise ModelError("no driver")
            super().__init__(name, data, row_in, row_out, threads, models.CPU)

    monkeypatch.setattr(models, "Graph", Picky)
    every = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(models.onnxruntime, "get_available_providers", lambda: every)
    assert Models(bundle, provider="auto").provider == "CPUExecutionProvider"
    assert tried[:2] == every
    with pytest.raises(ModelError, match="no driver"):
        Models(bundle, provider="cuda")
    with pytest.raises(ModelError, match=r"tensorrt is not installed; pip install 'nmoe\[edge-gpu\]'"):
        Models(bundle, provider="tensorrt")


def test_onnxruntime_stores_no_usage_data_in_the_home_folder(tiny_fleet, tmp_path):
    code = f"from nmoe_edge.models import *; Models(read_bundle(Path({str(tiny_fleet / 'barn')!r})))"
    # No other variables: onnxruntime sends nothing when it detects a test environment.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.rglob("*")) == []
