"""A round of SCAFFOLD matches the paper's formulas, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExtractorConfig
from nmoe_train.stages.extractor import Headed, fedce_round, steps_of_round
from nmoe_train.stages.scaffold import scaffold_round, zero_variates
from nmoe_train.stages.weights import copy_state

RATE = 0.1
PLAIN = ExtractorConfig(
    rounds=4, local_epochs=3, batch=50, rate=RATE, momentum=0.0, weight_decay=0.0, clip=1e9, warm_rounds=0
)
"""Three steps, each with all samples of the client"""


@pytest.fixture
def clients():
    torch.manual_seed(0)
    net = Headed(nn.Linear(3, 4), nn.Linear(4, 2))
    return net, [(torch.randn(n, 3), torch.arange(n) % 2) for n in (6, 10)]


def gradient(net, state, part):
    theta = {key: value.clone().requires_grad_() for key, value in state.items()}
    loss = cross_entropy(torch.func.functional_call(net, theta, (part[0],)), part[1])
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def close(one, other):
    return all(torch.allclose(one[key], other[key], atol=1e-5) for key in other)


def test_the_first_round_is_fedavg_and_a_variate_is_the_clients_mean_gradient(clients):
    net, data = clients
    start = [copy_state(net)] * 2
    after, variates, _ = scaffold_round(net, start, zero_variates(net, 2), data, 0, 0, PLAIN)
    averaged, _ = fedce_round(net, start, data, 0, 0, PLAIN)
    assert close(after[0], averaged[0])
    for client in range(2):
        state = dict(start[0])
        gradients = []
        for _ in range(3):
            gradients.append(gradient(net, state, data[client]))
            state = {key: state[key] - RATE * gradients[-1][key] for key in state}
        assert close(variates[client], {key: sum(g[key] for g in gradients) / 3 for key in state})


def test_later_steps_are_corrected_by_the_mean_variate_minus_the_own_one(clients):
    net, data = clients
    start = copy_state(net)
    torch.manual_seed(1)
    variates = [{key: torch.randn_like(w) for key, w in start.items()} for _ in range(2)]
    after, updated, _ = scaffold_round(net, [start] * 2, variates, data, 0, 0, PLAIN)
    mean = {key: (6 * variates[0][key] + 10 * variates[1][key]) / 16 for key in start}
    ends = []
    for client in range(2):
        state = dict(start)
        gradients = []
        for _ in range(3):
            gradients.append(gradient(net, state, data[client]))
            state = {
                key: w - RATE * (gradients[-1][key] + mean[key] - variates[client][key]) for key, w in state.items()
            }
        ends.append(state)
        assert close(updated[client], {key: sum(g[key] for g in gradients) / 3 for key in start})
    assert close(after[1], {key: (6 * ends[0][key] + 10 * ends[1][key]) / 16 for key in start})


@pytest.mark.parametrize("momentum", [0.5, 0.9, 1.0])
def test_with_momentum_a_constant_gradient_is_its_own_variate(clients, momentum):
    """Weights so large that the softmax is saturated make the gradient constant."""
    net, data = clients
    ones = [(x, torch.ones_like(y)) for x, y in data]
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([30.0, 0.0]))
    start = copy_state(net)
    config = replace(PLAIN, momentum=momentum, rate=1e-3)
    _, variates, _ = scaffold_round(net, [start] * 2, zero_variates(net, 2), ones, 0, 0, config)
    expected = gradient(net, start, ones[1])["head.bias"]
    assert torch.allclose(variates[1]["head.bias"], expected, rtol=0.05)


def test_clients_that_do_not_take_part_keep_their_variates_and_bytes_are_twice_those_of_fedavg(clients):
    net, data = clients
    start = [copy_state(net)] * 2
    config = replace(PLAIN, share=0.5)
    _, variates, finished = scaffold_round(net, start, zero_variates(net, 2), data, 0, 0, config)
    moved = [any(value.any() for value in own.values()) for own in variates]
    assert sorted(moved) == [False, True]
    _, plain = fedce_round(net, start, data, 0, 0, config)
    assert (finished.up, finished.down) == (2 * plain.up, 2 * plain.down)
    none = replace(PLAIN, local_epochs=0)
    states, variates, _ = scaffold_round(net, start, zero_variates(net, 2), data, 0, 0, none)
    assert close(states[0], start[0])
    assert not any(value.any() for own in variates for value in own.values())


def test_frozen_parameters_have_no_variate(clients):
    net, data = clients
    net.extractor.bias.requires_grad_(False)
    start = [copy_state(net)] * 2
    after, variates, _ = scaffold_round(net, start, zero_variates(net, 2), data, 0, 0, PLAIN)
    assert "extractor.bias" not in variates[0]
    assert torch.equal(after[0]["extractor.bias"], start[0]["extractor.bias"])


@pytest.mark.parametrize(("samples", "limit", "steps"), [(100, None, 15), (101, None, 15), (5, None, 3), (100, 7, 7)])
def test_steps_of_a_round_are_its_batches(samples, limit, steps):
    assert steps_of_round(samples, ExtractorConfig(batch=20, local_epochs=3, step_limit=limit)) == steps
