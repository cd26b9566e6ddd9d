"""Steps of the rivals match their papers' definitions, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExtractorConfig
from nmoe_train.results import rivals
from nmoe_train.results.rivals import Federation, ditto_round, fedrep_round, tuning_epoch, tuning_start
from nmoe_train.stages.extractor import Headed
from nmoe_train.stages.weights import copy_state

RATE = 0.1
CONFIG = ExtractorConfig(
    rounds=4, local_epochs=1, batch=50, rate=RATE, momentum=0.0, weight_decay=0.0, clip=1e9, warm_rounds=0
)


@pytest.fixture
def federation():
    """Two clients whose single batch holds all of their samples."""
    torch.manual_seed(0)
    net = Headed(nn.Linear(3, 4), nn.Linear(4, 2))
    parts = [(torch.randn(n, 3), torch.arange(n) % 2) for n in (6, 10)]
    return Federation(net, parts, parts, CONFIG, 0)


def gradient(f, state, client):
    theta = {key: value.clone().requires_grad_() for key, value in state.items()}
    x, y = f.train[client]
    loss = cross_entropy(torch.func.functional_call(f.net, theta, (x,)), y)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def close(one, other):
    return all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_ditto_pulls_every_clients_classifier_towards_the_average_it_received(federation):
    torch.manual_seed(1)
    personal = copy_state(Headed(nn.Linear(3, 4), nn.Linear(4, 2)))
    shared = copy_state(federation.net)
    states = {"fedavg": [shared] * 2, **{str(pull): [personal] * 2 for pull in rivals.PULLS}}
    after, _ = ditto_round(federation, states, 0)
    for pull in rivals.PULLS:
        for client in range(2):
            g = gradient(federation, personal, client)
            expected = {key: w - RATE * (g[key] + pull * (w - shared[key])) for key, w in personal.items()}
            assert close(after[str(pull)][client], expected)
    steps = [{key: w - RATE * gradient(federation, shared, i)[key] for key, w in shared.items()} for i in range(2)]
    assert close(after["fedavg"][0], {key: (6 * steps[0][key] + 10 * steps[1][key]) / 16 for key in shared})


@pytest.fixture
def deeper(federation):
    """The same clients with a head of two layers."""
    head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return replace(federation, net=Headed(nn.Linear(3, 4), head))


@pytest.mark.parametrize(("name", "own"), [("head 1", "head."), ("last 1", "head.2."), ("last 5", "head.2.")])
def test_fedrep_trains_a_clients_own_layers_first_then_the_others_and_averages_only_those(deeper, name, own):
    start = copy_state(deeper.net)
    after, _ = fedrep_round(deeper, {candidate: [start] * 2 for candidate in rivals.FEDREP}, 0)
    trained = []
    for client in range(2):
        state = dict(start)
        for _ in range(rivals.FEDREP[name][1]):
            g = gradient(deeper, state, client)
            state |= {key: state[key] - RATE * g[key] for key in state if key.startswith(own)}
        g = gradient(deeper, state, client)
        state |= {key: state[key] - RATE * g[key] for key in state if not key.startswith(own)}
        trained.append(state)
    for client in range(2):
        for key, found in after[name][client].items():
            mean = (6 * trained[0][key] + 10 * trained[1][key]) / 16
            assert torch.allclose(found, trained[client][key] if key.startswith(own) else mean, atol=1e-6), key
    assert all(p.requires_grad for p in deeper.net.parameters())


def test_fedrep_leaves_frozen_parameters_frozen(federation):
    federation.net.extractor.bias.requires_grad_(False)
    start = copy_state(federation.net)
    after, _ = fedrep_round(federation, {candidate: [start] * 2 for candidate in rivals.FEDREP}, 0)
    assert torch.equal(after["head 1"][0]["extractor.bias"], start["extractor.bias"])
    assert not federation.net.extractor.bias.requires_grad
    assert federation.net.head.bias.requires_grad


def test_fine_tuning_keeps_the_best_classifiers_of_any_epoch_and_rate(federation):
    states = tuning_start([copy_state(federation.net)] * 2)
    history = []
    best = []
    for epoch in range(5):
        states, _, entry = tuning_epoch(federation, states, epoch, history)
        history.append(entry)
        best.append(federation.held_out_accuracy(states["best"]))
        tried = federation.held_out_accuracies(states, rivals.TUNING_RATES)
        assert entry["accuracy"] == max(tried.values())
        assert best[-1] == max(e["accuracy"] for e in history)
    assert best == sorted(best)
    first = tuning_start([copy_state(federation.net)] * 2)
    spoiled, _, _ = tuning_epoch(federation, first, 0, [{"accuracy": 1.0}])
    assert spoiled["best"] is first["best"]
