"""What each graph of an int8 fleet is calibrated on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from export.foreign import INT8, modules

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.models import Graph
from nmoe_export import search
from nmoe_export.assignment import Assignment
from nmoe_export.calibrate import Recipe
from nmoe_export.candidate import Candidate
from nmoe_export.export import export_fleet
from nmoe_export.source import of_modules


@pytest.fixture
def saw(monkeypatch):
    """The inputs that each graph is calibrated on, by its name."""
    inputs_of = {}
    true = Candidate.calibrate

    def calibrate(self, inputs, recipe):
        inputs_of[self.name] = np.array(inputs)
        true(self, inputs, recipe)

    monkeypatch.setattr(Candidate, "calibrate", calibrate)
    return inputs_of


@pytest.mark.parametrize("kept", [(), ("extractor",), ("gate",)])
@pytest.mark.parametrize(("gates", "known"), [(1, False), (3, True), (3, False)])
def test_gates_and_experts_are_calibrated_on_what_they_will_receive(
    images, tmp_path, monkeypatch, saw, kept, gates, known
):
    """Experts see the latents of the written extractor that the written gates send to them."""
    extractor, gate, experts = modules(gates=gates)
    given = replace(of_modules(extractor, gate, experts, images), clients=np.arange(80) % 3 if known else None)

    def compare_speed(source, kind, *_):
        times_faster = 1.0 if kind in kept else 2.0
        return {"float_ms": times_faster, "written_ms": 1.0, "times_faster": times_faster, "reduced_bytes": 1}

    monkeypatch.setattr(search, "compare_speed", compare_speed)
    recipe = Recipe(least=5)
    done = export_fleet(given, tmp_path / "fleet", replace(INT8, recipe=recipe))
    assert [kind for kind, what in done.report["is"].items() if what == "fp32"] == list(kept)
    bundles = [read_bundle(tmp_path / "fleet" / f"device-0{i}").contents for i in range(3)]
    assert np.array_equal(saw["extractor"], images[given.calibration_rows])
    latents = Graph("extractor", bundles[0]["extractor.onnx"], (3, 8, 8), (8,))(images[given.calibration_rows])
    favourites = np.stack([Graph("gate", b["gate.onnx"], (8,), (3,))(latents).argmax(1) for b in bundles])
    for i in range(3):
        assert np.array_equal(saw[f"gate {i if gates > 1 else 0}"], latents)
        if known:
            owners = given.clients[given.calibration_rows]
            sent = (favourites[owners, np.arange(len(owners))] == i) | (owners == i)
        else:
            sent = (favourites == i).any(0)
        assert np.array_equal(saw[f"expert {i}"], latents[sent] if sent.sum() >= 5 else latents), i


def test_gates_and_experts_are_calibrated_on_the_latents_of_a_samples_file(source, images, tmp_path, saw):
    path = tmp_path / "theirs.npz"
    np.savez(path, inputs=images[::2] // 2)
    export_fleet(source, tmp_path / "fleet", replace(INT8, recipe=Recipe(data=f"npz:{path}")))
    contents = read_bundle(tmp_path / "fleet" / "device-00").contents
    latents = Graph("extractor", contents["extractor.onnx"], (3, 8, 8), (8,))(images[::2] // 2)
    assert np.array_equal(saw["extractor"], images[::2] // 2)
    assert np.array_equal(saw["gate 0"], latents)
    for i in range(3):
        assert {row.tobytes() for row in saw[f"expert {i}"]} <= {row.tobytes() for row in latents}


def test_an_assignment_changes_one_part_at_a_time():
    start = Assignment()
    changed = start.with_float("gate").with_float("conv1")
    assert (changed.kinds, changed.nodes) == ({"gate"}, {"conv1"})
    assert changed.is_float("gate")
    assert changed.is_float("conv1")
    assert not changed.is_float("expert")
    assert changed.without_float("conv1") == start.with_float("gate")
    assert changed.without_float("gate").without_float("conv1") == start == Assignment()
    assert changed.float_nodes("extractor") == {"conv1"}
    assert changed.float_nodes("gate") == frozenset()
