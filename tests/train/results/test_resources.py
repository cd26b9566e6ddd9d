"""Counts of multiply-adds and bytes match counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nmoe_train.config import ExtractorConfig
from nmoe_train.pipeline import train
from nmoe_train.recipes import configure
from nmoe_train.results.resources import Work, client_seconds, multiply_adds, rows_trained
from nmoe_train.stages.extractor import _batches

SHORT = {"extractor": {"rounds": 3}, "gate": {"rounds": 4, "laps": 2}, "experts": {"epochs": 2}, "data": {"clients": 3}}


def test_multiply_adds_of_layers_match_their_formula():
    assert multiply_adds(nn.Linear(5, 7), torch.zeros(2, 5)) == Work(35, 35)
    two = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert multiply_adds(two, torch.zeros(4, 5)) == Work(35 + 21, 35 + 2 * 21)
    convolution = nn.Conv2d(2, 6, 3, padding=1)
    assert multiply_adds(convolution, torch.zeros(2, 2, 8, 8)).forward == 8 * 8 * 2 * 6 * 9


def test_frozen_layers_have_no_backward_pass():
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    net[0].requires_grad_(False)
    assert multiply_adds(net, torch.zeros(2, 5)) == Work(56, 21)
    assert multiply_adds(net.requires_grad_(False), torch.zeros(2, 5)) == Work(56, 0)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("samples", [1, 2, 9, 10, 11, 20, 21, 25])
@pytest.mark.parametrize("limit", [None, 1, 3, 100])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_rows_of_a_round_are_those_of_its_batches(samples, limit, epochs):
    config = ExtractorConfig(batch=10, local_epochs=epochs, step_limit=limit)
    batches = list(_batches(samples, config, torch.Generator()))[:limit]
    assert rows_trained(samples, config) == sum(map(len, batches))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"extractor": {"drop": 0.4, "share": 0.67, "step_limit": 2, "rounds": 3}},
        {"gate": {"method": "rollgate", "laps": 2, "order": "shuffled"}},
        {"gate": {"method": "rangate"}},
        {"gate": {"method": "fedgate"}},
        {"extractor": {"method": "fedsc", "rounds": 2, "local_epochs": 1}},
        {"extractor": {"heads": "local", "rounds": 2}},
    ],
)
def test_the_clients_add_up_to_the_stage_and_the_bytes_to_those_of_the_history(tmp_path, changes):
    run = train(configure(flags={**SHORT, **changes}), tmp_path / "run")
    resources = run.metrics["resources"]
    for name, stage in resources["stages"].items():
        assert {key: stage[key] for key in ("up", "down")} == run.metrics["bytes"][name]
        for key, values in stage["clients"].items():
            assert len(values) == 3
            assert sum(values) == stage[key]
        seconds = run.metrics["seconds"][name]
        spread = sum(resources["client_seconds"][name])
        assert spread == pytest.approx(seconds if stage["multiply_adds"] else 0)
    assert set(resources["measured"]) == {"extractor", "experts", "gate", "evaluate"}
    assert all(used["peak_memory_bytes"] > 10**7 for used in resources["measured"].values())


def test_a_default_run_counts_what_its_clients_compute_and_send(tmp_path):
    run = train(configure(flags={**SHORT, "gate": {"method": "fedgate", "rounds": 2}}), tmp_path / "run")
    resources = run.metrics["resources"]
    work = {name: Work(**figures) for name, figures in resources["networks"].items()}
    assert work["gate"] == Work(64 * 3, 64 * 3)
    assert work["expert"].forward == 64 * 64 + 64 * 32 + 32 * 32 + 32 * 10
    assert work["classifier"].forward == work["extractor"].forward + work["expert"].forward
    samples = sum(run.metrics["split"]["train"][1])
    stages = resources["stages"]
    assert stages["extractor"]["clients"]["multiply_adds"][1] == 3 * 2 * samples * work["classifier"].training
    weights = sum(p.numel() for net in (run.extractor(), run.head(0)) for p in net.state_dict().values())
    assert resources["fedavg"] == {"up": 3 * 3 * 4 * weights, "down": 3 * 3 * 4 * weights}
    assert stages["extractor"]["up"] == resources["fedavg"]["up"]


def test_a_stage_without_work_gets_no_seconds():
    stages = {"gate": {"multiply_adds": 0, "clients": {"multiply_adds": [0, 0]}}}
    assert client_seconds(stages, {"gate": {"seconds": 1.0}}) == {"gate": [0.0, 0.0]}
    assert client_seconds(stages, {}) == {"gate": [0.0, 0.0]}
