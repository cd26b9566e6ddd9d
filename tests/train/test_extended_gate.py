from __future__ import annotations

import hashlib

import pytest
import torch

from nmoe_edge.models import Graph
from nmoe_export.graphs import export_graph
from nmoe_train.data.clients import assign_samples
from nmoe_train.data.datasets import load
from nmoe_train.errors import RunError
from nmoe_train.pipeline import config_of, extended_gate, retrain_config, train
from nmoe_train.recipes import configure
from nmoe_train.run import read_run
from nmoe_train.trainer import encode

FLAGS = {
    "gate": {"method": "statgate"},
    "data": {"partition": "classes:2"},
    "extractor": {"rounds": 4},
    "experts": {"epochs": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(configure(flags=FLAGS), tmp_path_factory.mktemp("joining") / "run")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}


def test_a_device_joins_a_finished_run_by_its_statistics_alone(run, tmp_path):
    """Ten clients know two digits each; the eleventh has its own copy of the first one's rows, turned upside down."""
    before = digests(run.folder)
    config = config_of(run)
    clients = assign_samples(load("digits"), config.data, config.seed)
    x, y = clients.train[0]
    gate, published = extended_gate(run, [(255 - x, y)])
    assert len(published) == 11
    assert all(torch.equal(a.means, b.means) for a, b in zip(published, run.statistics(), strict=False))
    assert digests(run.folder) == before
    with torch.no_grad():
        new = gate(encode(run.extractor(), 255 - clients.held_out[0][0])).argmax(1)
        h = encode(run.extractor(), torch.cat([x for x, _ in clients.held_out]))
        same = gate(h).argmax(1) == run.gate(0)(h).argmax(1)
    assert (new == 10).double().mean() > 0.9
    assert same.double().mean() > 0.9
    other = train(retrain_config(run, "gate", {"gate": {"method": "rangate"}}), tmp_path / "other", again=(run, "gate"))
    with pytest.raises(RunError, match="only a gate of statistics"):
        extended_gate(other, [])


def test_a_run_keeps_the_statistics_and_trains_again_to_the_same_gate(run, tmp_path):
    again = train(retrain_config(run, "gate", {}), tmp_path / "again", again=(run, "gate"))
    measured = train(retrain_config(run, "evaluate", {}), tmp_path / "measured", again=(run, "evaluate"))
    for name in ("gate.safetensors", "statistics.safetensors"):
        assert digests(run.folder)[name] == digests(again.folder)[name] == digests(measured.folder)[name]
    rounds = [entry for entry in run.metrics["history"] if entry["stage"] == "gate"]
    assert len(rounds) == 1
    assert run.metrics["bytes"]["experts"] == {"up": 0, "down": 0}  # no expert leaves its device
    assert run.metrics["bytes"]["gate"]["up"] == rounds[0]["up"] > 0


def test_damaged_statistics_are_refused_by_name(run, tmp_path):
    path = run.folder / "statistics.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-4])
        with pytest.raises(RunError, match=r"statistics\.safetensors"):
            read_run(run.folder)
    finally:
        path.write_bytes(whole)


def test_the_gate_of_a_run_is_exported_like_any_other(run):
    gate = run.gate(0)
    h = encode(run.extractor(), torch.from_numpy(run.calibration()["inputs"].copy()))
    graph = Graph("gate", export_graph(gate, "gate", h[:2]), (64,), (10,))
    with torch.no_grad():
        expected = gate(h).numpy()
    assert abs(graph(h.numpy()) - expected).max() < 1e-3
