from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nmoe_train.config import Config, GateConfig
from nmoe_train.nets import MLP, NetSpec, build
from nmoe_train.stages.federation import active_clients, generator
from nmoe_train.stages.gate import (
    Gate,
    GateSamples,
    client_at,
    composed_gate,
    fedgate_round,
    gate_samples,
    plain_gate,
    rollgate_stop,
)
from nmoe_train.stages.losses import load_loss, mixture_loss

DIM = 4
EXPERTS = 3
CLASSES = 5


def gate(shared=None, own="bias"):
    return Gate(shared or nn.Linear(DIM, EXPERTS), DIM, EXPERTS, own)


def begin(net):
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def samples(*sizes, kind="probabilities", seed=0):
    torch.manual_seed(seed)
    return [
        gate_samples(torch.randn(n, DIM), 5 * torch.randn(n, EXPERTS, CLASSES), torch.randint(0, CLASSES, (n,)), kind)
        for n in sizes
    ]


def test_a_fresh_gate_scores_every_expert_equally():
    h = torch.randn(7, DIM)
    assert not gate()(h).any()
    assert not gate(MLP(DIM, EXPERTS, [8]))(h).any()


def test_a_client_that_is_not_scheduled_keeps_its_own_part_and_gets_the_shared_part():
    net, config = gate(), GateConfig(method="fedgate", share=0.3, rounds=2)
    ((active,), _) = active_clients(3, 0.3, 0.0, 0, "gate", 0)
    after, record = fedgate_round(net, [begin(net)] * 3, samples(9, 9, 9), 0, 0, config)
    for client in range(3):
        assert (after[client]["own.bias"].abs().sum() > 0) == (client == active)
        assert torch.equal(after[client]["shared.weight"], after[active]["shared.weight"])
    assert record.up == record.down == 4 * (DIM * EXPERTS + EXPERTS)


@pytest.mark.parametrize(
    ("own", "kept"), [("nothing", set()), ("bias", {"own.bias"}), ("weights", {"own.bias", "own.weight"})]
)
def test_gate_own_sets_which_weights_a_device_keeps_to_itself(own, kept):
    net = gate(own=own)
    after, _ = fedgate_round(
        net, [begin(net)] * 3, samples(9, 9, 9), 0, 0, GateConfig(method="fedgate", own=own, share=1.0, rounds=2)
    )
    assert {key for key in after[0] if key.startswith("own.") and after[0][key].any()} == kept
    for key in kept:
        assert not torch.equal(after[0][key], after[1][key])


def test_one_round_follows_the_gradient_of_the_configured_loss():
    """One client and two steps against a naive computation with noise, load loss, step and rate."""
    config = GateConfig(
        own="nothing",
        loss="outputs",
        local_steps=2,
        batch=6,
        noise=0.3,
        load_loss=0.5,
        step="clipped",
        rounds=4,
        rate=0.7,
    )
    net, (data,) = gate(own="nothing"), samples(10, kind="outputs")
    after, record = fedgate_round(net, [begin(net)], [data], 1, 5, config)
    g = generator(5, "gate", 1, 0)
    theta, losses = begin(net), []
    rate = 0.7 * 0.5 * (1 + math.cos(math.pi / 4))
    for _ in range(2):
        rows = torch.randperm(10, generator=g)[:6]
        noise = 0.3 * torch.randn(6, EXPERTS, generator=g)
        weight, bias = theta["shared.weight"].requires_grad_(), theta["shared.bias"].requires_grad_()
        log_g = (data.latents[rows] @ weight.T + bias + noise).log_softmax(1)
        loss = mixture_loss(log_g, data.expert_answers[rows], data.y[rows], "outputs").mean()
        loss = loss + 0.5 * load_loss(log_g.exp(), torch.ones(6))
        gradients = torch.autograd.grad(loss, [weight, bias])
        length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        for key, gradient in zip(("shared.weight", "shared.bias"), gradients, strict=True):
            theta[key] = theta[key].detach() - rate / max(1, length) * gradient
        losses.append(loss.item())
    assert record.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert torch.allclose(after[0]["shared.weight"], theta["shared.weight"], atol=1e-6)
    assert torch.allclose(after[0]["shared.bias"], theta["shared.bias"], atol=1e-6)


@pytest.mark.parametrize("kind", ["probabilities", "outputs"])
def test_gates_trained_together_do_not_influence_each_other(kind):
    """Clients of unequal size, one smaller than a batch: padding has no influence."""
    net, data = gate(own="weights"), samples(30, 3, 12, kind=kind)
    config = GateConfig(
        method="fedgate",
        own="weights",
        loss=kind,
        share=1.0,
        rounds=2,
        batch=8,
        local_steps=3,
        load_loss=0.1,
        noise=0.0,
    )
    together, _ = fedgate_round(net, [begin(net)] * 3, data, 0, 0, config)
    for client in range(3):
        others = samples(30, 3, 12, kind=kind, seed=9)
        others[client] = data[client]
        alone, _ = fedgate_round(net, [begin(net)] * 3, others, 0, 0, config)
        assert torch.allclose(alone[client]["own.weight"], together[client]["own.weight"], atol=1e-6)
        assert not torch.allclose(alone[client - 1]["own.weight"], together[client - 1]["own.weight"], atol=1e-6)


def test_a_unit_step_is_as_long_as_the_rate_and_a_clipped_step_at_most_that_long():
    net = gate()
    for step in ("unit", "clipped"):
        config = GateConfig(method="fedgate", step=step, rounds=1, rate=0.05, own="bias")
        after, _ = fedgate_round(net, [begin(net)], samples(9), 0, 0, config)
        length = math.sqrt(sum(value.square().sum().item() for value in after[0].values()))
        assert length == pytest.approx(0.05, rel=1e-4) if step == "unit" else length <= 0.05 * 1.0001


@pytest.mark.parametrize("kind", ["probabilities", "outputs", "expected"])
def test_with_top_k_in_training_an_expert_that_is_never_kept_is_never_moved(kind):
    net = gate(own="nothing")
    before = {**begin(net), "shared.bias": torch.tensor([4.0, 3.0, -4.0])}
    moved = {}
    for kept in (2, None):
        config = GateConfig(
            method="fedgate", loss=kind, train_top_k=kept, share=1.0, rounds=2, rate=0.1, noise=0.1, step="clipped"
        )
        ((after,), _) = fedgate_round(net, [before], samples(30, kind=kind), 0, 0, config)
        moved[kept] = (after["shared.weight"] - before["shared.weight"]).abs().sum(1)
    assert moved[2].isfinite().all()
    assert (moved[2] > 0).tolist() == [True, True, False]
    assert (moved[None] > 0).all()


def test_the_expected_loss_prefers_the_expert_that_is_right():
    """Expert 0 gives the truth a probability of 0.9, the others 0.1."""
    data = GateSamples(
        torch.randn(50, DIM), torch.tensor([[0.9, 0.1, 0.1]]).log().repeat(50, 1), torch.zeros(50).long()
    )
    net = gate(own="nothing")
    states = [begin(net)]
    config = GateConfig(method="fedgate", loss="expected", share=1.0, rounds=20)
    for round_ in range(20):
        states, record = fedgate_round(net, states, [data], round_, 0, config)
    net.load_state_dict(states[0])
    assert (net(data.latents).argmax(1) == 0).double().mean() > 0.9
    assert record.loss < 0.5
    assert config.combination == "probabilities"


def test_a_gate_may_be_an_mlp():
    net = gate(MLP(DIM, EXPERTS, [8]))
    config = GateConfig(widths=(8,), rounds=20, rate=0.3, share=1.0)
    states, losses = [begin(net)] * 2, []
    for round_ in range(20):
        states, record = fedgate_round(net, states, samples(40, 40), round_, 0, config)
        losses.append(record.loss)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shared", [nn.Linear(DIM, EXPERTS), MLP(DIM, EXPERTS, [8, 6])])
def test_an_exported_gate_gives_the_same_scores_and_can_be_imported(shared):
    torch.manual_seed(0)
    net, h = gate(shared, "weights" if isinstance(shared, nn.Linear) else "bias"), torch.randn(5, DIM)
    state = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    expected = net(h)
    shared.load_state_dict(plain_gate(state))
    assert torch.allclose(shared(h), expected, atol=1e-5)
    own = {key: torch.zeros_like(value) for key, value in state.items() if key.startswith("own.")}
    net.load_state_dict(composed_gate(plain_gate(state), own))
    assert torch.allclose(net(h), expected, atol=1e-5)


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.15, 0.05]])
def test_rangate_chooses_experts_with_the_given_shares(shares):
    torch.manual_seed(0)
    net = build(NetSpec("random", {"dim": 32, "outputs": 4, "shares": shares}))
    h = nn.functional.layer_norm(torch.randn(20_000, 32), (32,))
    chosen = torch.bincount(net(h).argmax(1), minlength=4) / len(h)
    assert chosen.tolist() == pytest.approx(shares, abs=0.015)


def test_rangate_spreads_similar_latents_over_all_experts():
    """Ten tight clusters, like classes: each one is spread over the experts almost evenly."""
    torch.manual_seed(1)
    net = build(NetSpec("random", {"dim": 64, "outputs": 5, "shares": [0.2] * 5}))
    for _ in range(10):
        cluster = nn.functional.layer_norm(torch.randn(64) * 1.5 + torch.randn(3000, 64), (64,))
        share = torch.bincount(net(cluster).argmax(1), minlength=5) / 3000
        assert share.min() > 0.1
        assert share.max() < 0.3


def test_rollgate_learns_which_client_a_latent_comes_from():
    torch.manual_seed(0)
    centres = 3 * torch.eye(3, DIM)
    data = [
        gate_samples(
            centres[i] + 0.1 * torch.randn(60, DIM), torch.zeros(60, 3, 2), torch.zeros(60, dtype=torch.long), "outputs"
        )
        for i in range(3)
    ]
    net = gate()
    states, config = [begin(net)] * 3, GateConfig(method="rollgate", laps=6, rate=0.2)
    for stop in range(18):
        states, record = rollgate_stop(net, states, data, stop, 0, config)
    net.load_state_dict(states[0])
    for client, client_samples in enumerate(data):
        assert (net(client_samples.latents).argmax(1) == client).float().mean() > 0.95
    assert record.accuracy == pytest.approx(0.7, abs=0.15)  # three labels in ten name another client


def test_rollgate_labels_a_share_roll_own_of_samples_with_the_own_client():
    """The gate always answers client 1 and hardly learns, so its accuracy is how often client 1 is the label."""
    net = gate()
    state = {**begin(net), "shared.bias": torch.tensor([0.0, 9.0, 0.0])}
    data = samples(3000, 3000, 3000)
    for own, share in ((0.9, 0.9), (0.2, 0.2)):
        config = GateConfig(method="rollgate", roll_own=own, rate=1e-9, batch=3000)
        _, record = rollgate_stop(net, [state] * 3, data, 1, 0, config)
        assert record.accuracy == pytest.approx(share, abs=0.03)
        _, record = rollgate_stop(net, [state] * 3, data, 0, 0, config)
        assert record.accuracy == pytest.approx((1 - share) / 2, abs=0.03)


def test_rollgate_visits_every_client_once_per_lap():
    ring = GateConfig(method="rollgate")
    assert [client_at(stop, 4, 0, ring) for stop in range(8)] == [0, 1, 2, 3] * 2
    drawn = [client_at(stop, 40, 0, GateConfig(method="rollgate", order="shuffled")) for stop in range(80)]
    assert sorted(drawn[:40]) == sorted(drawn[40:]) == list(range(40))
    assert drawn[:40] != drawn[40:]


def test_gate_net_builds_the_configured_gate():
    assert Config(gate=GateConfig(method="fedgate")).gate_net(10) == NetSpec("linear", {"dim": 64, "outputs": 10})
    assert Config(gate=GateConfig(method="fedgate", widths=(16,))).gate_net(10).factory == "mlp"
    assert Config(gate=GateConfig(method="rangate")).gate_net(10).arguments["shares"] == [0.1] * 10


def test_the_rate_of_rollgate_falls_along_a_cosine():
    net = gate()
    config = GateConfig(method="rollgate", laps=2, rate=0.1, batch=100)
    for stop in (0, 3, 5):
        after, _ = rollgate_stop(net, [begin(net)] * 3, samples(9, 9, 9), stop, 0, config)
        moved = math.sqrt(sum((after[0][key] - begin(net)[key]).square().sum().item() for key in after[0]))
        assert moved == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * stop / 6)), rel=1e-3)
