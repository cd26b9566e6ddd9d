"""A fleet's graphs run as devices run them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export.foreign import modules
from torch import nn

from nmoe_edge.models import Graph
from nmoe_edge.protocol.tensor import Tensor
from nmoe_export.graphs import export_graph, replace_weights
from nmoe_export.simulation import Graphs, Simulation, gate_agreement


@pytest.fixture(scope="module")
def graphs(source):
    """The source's float graphs."""
    rows = torch.from_numpy(source.inputs[:8])
    with torch.no_grad():
        h = source.extractor(rows)
    return Graphs(
        export_graph(source.extractor, "e", rows),
        [export_graph(source.gates[0], "g", h)],
        [export_graph(expert, "x", h) for expert in source.experts],
    )


def test_experts_see_latents_as_they_travel_and_gates_see_the_exact_latents(source, graphs):
    system = Simulation(source, graphs, "int8")
    travelled = np.array(Tensor.pack(system.latents, "int8").unpack())
    assert np.abs(travelled - system.latents).max() > 0
    for i, data in enumerate(graphs.experts):
        assert np.array_equal(system.outputs[:, i], Graph("x", data, (8,), (4,))(travelled))
    assert np.array_equal(system.scores[0], Graph("g", graphs.gates[0], (8,), (3,))(system.latents))


def test_gates_agree_when_they_prefer_the_same_expert_for_the_measured_samples(source, graphs):
    one, two = Simulation(source, graphs, "float32"), Simulation(source, graphs, "float32")
    assert gate_agreement(one, two) == 1
    others = source.measured_rows[:10]
    two.scores[0][others] = np.roll(one.scores[0][others], 1, axis=1)
    two.scores[0][source.calibration_rows] = np.roll(one.scores[0][source.calibration_rows], 1, axis=1)
    assert gate_agreement(one, two) == pytest.approx(0.75)
    assert one.load() != two.load()


def test_float_graphs_answer_what_torch_answers(source):
    rows = torch.from_numpy(source.inputs)
    with torch.no_grad():
        h = source.extractor(rows)
        expected = torch.stack([expert(h) for expert in source.experts], 1)
        asked = source.gates[0](h).argmax(1)
    example = h[:8]
    graphs = Graphs(
        export_graph(source.extractor, "e", rows[:8]),
        [export_graph(source.gates[0], "g", example)],
        [export_graph(expert, "x", example) for expert in source.experts],
    )
    system = Simulation(source, graphs, "float32")
    assert np.abs(system.outputs - expected.numpy()).max() < 1e-4
    answered = expected[torch.arange(len(asked)), asked].argmax(1).numpy()
    assert (system.answered_classes(source.inference)[0] == answered[source.measured_rows]).mean() > 0.97


def test_a_graph_refilled_with_weights_equals_an_exported_graph():
    _, _, experts = modules()
    rows = torch.randn(8, 8)
    first = export_graph(experts[0], "expert 0", rows)
    again = replace_weights(first, experts[2], "expert 2", rows)
    assert again == export_graph(experts[2], "expert 2", rows)
    assert replace_weights(first, nn.Linear(8, 4), "other", rows) is None
