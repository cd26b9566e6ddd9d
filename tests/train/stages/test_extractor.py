from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nmoe_train.config import ExtractorConfig, FedSCConfig
from nmoe_train.data.views import VIEWS, strong
from nmoe_train.stages.extractor import Headed, MatrixNoise, fedce_round, fedsc_round, matrix
from nmoe_train.stages.federation import active_clients, generator, size_bytes
from nmoe_train.stages.losses import cap_length, correlation, spectral_loss
from nmoe_train.stages.privacy import epsilon_spent


def classifier(seed=0, middle=()):
    torch.manual_seed(seed)
    return Headed(nn.Sequential(nn.Linear(5, 4), *middle), nn.Linear(4, 3))


def labelled(*sizes):
    return [(torch.randn(n, 5) + i, torch.randint(0, 3, (n,))) for i, n in enumerate(sizes)]


def begin(net):
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def test_one_round_of_fedce_is_sgd_and_an_average():
    """One local epoch of one full batch without momentum: θ - rate · Σ nᵢ/n ∇ᵢ."""
    net, data = classifier(), labelled(6, 2)
    config = ExtractorConfig(
        rounds=1, local_epochs=1, batch=100, momentum=0, weight_decay=0, clip=1e9, warm_rounds=0, rate=0.1
    )
    after, record = fedce_round(net, [begin(net)] * 2, data, 0, 0, config)
    losses = [nn.functional.cross_entropy(net(x), y) for x, y in data]
    loss = (6 * losses[0] + 2 * losses[1]) / 8
    assert record.loss == pytest.approx(loss.item(), rel=1e-5)
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    assert record.accuracy == pytest.approx(right / 8)
    for (key, value), gradient in zip(
        net.named_parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
    ):
        assert torch.allclose(after[0][key], value - 0.1 * gradient, atol=1e-6)
        assert after[0][key] is after[1][key]


def test_clients_that_are_not_scheduled_or_drop_out_do_not_influence_the_round():
    net, data = classifier(), labelled(8, 8, 8, 8)
    config = ExtractorConfig(share=0.75, drop=0.5, rounds=9)
    for round_ in range(6):
        active, dropped = active_clients(4, 0.75, 0.5, 0, "extractor", round_)
        after, record = fedce_round(net, [begin(net)] * 4, data, round_, 0, config)
        assert record.lost == dropped
        assert (record.up, record.down) == (
            size_bytes(begin(net)) * len(active),
            size_bytes(begin(net)) * (len(active) + len(dropped)),
        )
        other = [(x + 9, y) if i not in active else (x, y) for i, (x, y) in enumerate(data)]
        same, _ = fedce_round(net, [begin(net)] * 4, other, round_, 0, config)
        assert all(torch.equal(after[0][key], same[0][key]) for key in after[0])


def test_a_round_in_which_every_client_drops_out_keeps_the_state():
    net = classifier()
    config = ExtractorConfig(drop=0.999, rounds=2)
    after, record = fedce_round(net, [begin(net)] * 2, labelled(4, 4), 0, 0, config)
    assert record.loss is None
    assert record.lost == (0, 1)
    assert all(torch.equal(after[1][key], value) for key, value in begin(net).items())


def test_a_client_stops_at_the_step_limit_and_sends_its_weights():
    net, data = classifier(), labelled(40)
    full, _ = fedce_round(net, [begin(net)], data, 0, 0, ExtractorConfig(batch=10, local_epochs=1, rounds=2))
    two, _ = fedce_round(
        net, [begin(net)], data, 0, 0, ExtractorConfig(batch=10, local_epochs=1, rounds=2, step_limit=2)
    )
    same, _ = fedce_round(
        net, [begin(net)], data, 0, 0, ExtractorConfig(batch=10, local_epochs=1, rounds=2, step_limit=4)
    )
    assert torch.equal(full[0]["head.weight"], same[0]["head.weight"])
    assert not torch.equal(full[0]["head.weight"], two[0]["head.weight"])


def test_the_rate_warms_up_in_the_first_rounds():
    """Without momentum and weight decay a step is proportional to the rate."""
    net, data = classifier(), labelled(6)

    def moved(warm):
        config = ExtractorConfig(
            rounds=50, local_epochs=1, batch=100, momentum=0, weight_decay=0, clip=1e9, warm_rounds=warm
        )
        after, _ = fedce_round(net, [begin(net)], data, 0, 0, config)
        return (after[0]["head.weight"] - begin(net)["head.weight"]).norm().item()

    assert moved(0) == pytest.approx(5 * moved(4), rel=1e-3)


def test_batchnorm_statistics_are_averaged_and_counters_are_copied():
    net, data = classifier(middle=(nn.BatchNorm1d(4),)), labelled(8, 8)
    start = begin(net)
    after, _ = fedce_round(net, [start] * 2, data, 0, 0, ExtractorConfig(batch=8, local_epochs=1, rounds=1))
    assert not torch.equal(after[0]["extractor.1.running_mean"], start["extractor.1.running_mean"])
    assert after[0]["extractor.1.num_batches_tracked"].item() == 1
    assert start["extractor.1.num_batches_tracked"].item() == 0


def test_a_last_batch_of_one_row_joins_the_batch_before_it():
    net, data = classifier(middle=(nn.BatchNorm1d(4),)), labelled(9)
    after, _ = fedce_round(net, [begin(net)], data, 0, 0, ExtractorConfig(batch=4, local_epochs=1, rounds=1))
    assert after[0]["extractor.1.num_batches_tracked"].item() == 2


def test_batchnorm_statistics_of_a_frozen_layer_do_not_change():
    net = classifier(middle=(nn.BatchNorm1d(4),))
    net.extractor[1].requires_grad_(False)
    start = begin(net)
    after, _ = fedce_round(net, [start], labelled(8), 0, 0, ExtractorConfig(batch=4, rounds=1))
    assert torch.equal(after[0]["extractor.1.running_mean"], start["extractor.1.running_mean"])


def test_dropout_depends_on_the_seed_and_leaves_the_global_generator_untouched():
    net, data = classifier(middle=(nn.Dropout(0.5),)), labelled(20)
    config = ExtractorConfig(batch=5, rounds=1)
    torch.manual_seed(1)
    once, _ = fedce_round(net, [begin(net)], data, 0, 0, config)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(2)
    twice, _ = fedce_round(net, [begin(net)], data, 0, 0, config)
    assert torch.equal(once[0]["head.weight"], twice[0]["head.weight"])
    torch.manual_seed(1)
    fedce_round(net, [begin(net)], data, 0, 0, config)
    assert torch.equal(torch.rand(3), expected)


def test_local_heads_stay_with_their_clients_and_an_absent_client_keeps_its_head():
    net, data = classifier(), labelled(8, 8, 8)
    states = [{**begin(net), "head.bias": torch.full((3,), float(i))} for i in range(3)]
    config = ExtractorConfig(heads="local", rounds=2, share=0.67)
    active, _ = active_clients(3, 0.67, 0.0, 0, "extractor", 0)
    after, record = fedce_round(net, states, data, 0, 0, config)
    (absent,) = set(range(3)) - set(active)
    assert torch.equal(after[absent]["head.bias"], states[absent]["head.bias"])
    assert not any(torch.equal(after[i]["head.bias"], states[i]["head.bias"]) for i in active)
    assert torch.equal(after[0]["extractor.0.weight"], after[2]["extractor.0.weight"])
    assert record.up == 2 * size_bytes({k: v for k, v in states[0].items() if k.startswith("extractor.")})


class Pixels(nn.Module):
    """(n, 1, 4, 4) -> (n, 4)"""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x.float().flatten(1) / 255)


def images(*sizes):
    torch.manual_seed(1)
    return [(torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8), torch.zeros(n)) for n in sizes]


def projected(seed=0):
    torch.manual_seed(seed)
    return Headed(Pixels(), nn.Linear(4, 4))


def test_a_correlation_matrix_is_the_mean_over_views_and_has_a_bounded_norm():
    net, ((x, _),) = projected(), images(7)
    state, g = begin(net), torch.Generator().manual_seed(5)
    fedsc = FedSCConfig(radius=0.01, matrix_views=3)
    r = matrix(net, state, x, fedsc, g)
    assert torch.allclose(r, r.T)
    assert r.norm() <= 0.01 + 1e-6
    assert torch.trace(r).item() == pytest.approx(0.01, rel=1e-4)  # every row is longer than √0.01 and gets cut
    g = torch.Generator().manual_seed(5)
    naive = sum(correlation(cap_length(net(strong(x, g)), 0.01)) for _ in range(3)) / 3
    assert torch.allclose(r, naive, atol=1e-7)


def test_the_loss_of_fedsc_falls_over_thirty_rounds():
    net, data = projected(), images(30, 30)
    config = ExtractorConfig(method="fedsc", rounds=30, batch=30, local_epochs=2, rate=0.05, warm_rounds=0)
    states, losses = [begin(net)] * 2, []
    for round_ in range(30):
        states, record = fedsc_round(net, states, data, round_, 0, config, FedSCConfig(alpha=1.0))
        losses.append(record.loss)
        assert record.accuracy is None
        assert record.epsilon is None
    assert states[0]["head.weight"] is states[1]["head.weight"]
    assert sum(losses[:5]) / 5 > sum(losses[-5:]) / 5 + 0.1


def test_noise_changes_the_weights_and_epsilon_grows_with_every_round():
    net, data = projected(), images(30, 20)
    config = ExtractorConfig(method="fedsc", rounds=4, batch=30, local_epochs=1)
    quiet, _ = fedsc_round(net, [begin(net)] * 2, data, 0, 0, config, FedSCConfig())
    # In the first round α is 1 and the matrices of the other clients have no influence.
    same, first = fedsc_round(net, [begin(net)] * 2, data, 0, 0, config, FedSCConfig(epsilon=8.0))
    assert torch.equal(quiet[0]["head.weight"], same[0]["head.weight"])
    quiet, _ = fedsc_round(net, [begin(net)] * 2, data, 3, 0, config, FedSCConfig())
    noisy, last = fedsc_round(net, [begin(net)] * 2, data, 3, 0, config, FedSCConfig(epsilon=8.0))
    assert not torch.equal(quiet[0]["head.weight"], noisy[0]["head.weight"])
    assert 0 < first.epsilon < last.epsilon == pytest.approx(8.0, rel=1e-6)


def test_sigma_meets_the_budget_of_every_client_and_a_given_sigma_limits_the_rounds():
    config = ExtractorConfig(rounds=20)
    noise = MatrixNoise([100, 50], config, FedSCConfig(epsilon=8.0))
    for n, sigma in zip([100, 50], noise.sigmas, strict=True):
        assert epsilon_spent(math.sqrt(2) * 4 / n, sigma, 20, 1e-5) == pytest.approx(8.0, rel=1e-6)
    fixed = MatrixNoise([100, 50], config, FedSCConfig(epsilon=8.0, sigma=0.14))
    assert 0 < fixed.rounds < 20
    assert fixed.epsilon_after(fixed.rounds) <= 8.0 < fixed.epsilon_after(fixed.rounds + 1)
    assert MatrixNoise([100], config, FedSCConfig()).epsilon_after(20) is None


def test_a_released_matrix_is_symmetric_and_has_noise_of_the_given_sigma():
    noise = MatrixNoise([100], ExtractorConfig(), FedSCConfig(sigma=0.5))
    r = noise.apply(0, torch.zeros(200, 200), torch.Generator().manual_seed(0))
    assert torch.equal(r, r.T)
    assert r.diagonal().std().item() == pytest.approx(0.5, rel=0.15)
    assert r.triu(1)[torch.ones(200, 200).triu(1) > 0].std().item() == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


@pytest.mark.parametrize("own_weight", ["falling", "share"])
def test_two_rounds_of_fedsc_match_a_naive_computation(own_weight):
    """Clients of unequal size, noise, two rounds: the matrices, the updates, the average and the bytes sent."""
    config = ExtractorConfig(
        method="fedsc",
        rounds=5,
        batch=64,
        local_epochs=1,
        rate=0.3,
        momentum=0,
        weight_decay=0.1,
        clip=0.5,
        warm_rounds=1,
    )
    fedsc = FedSCConfig(radius=0.02, views="crop", matrix_views=2, sigma=0.01, alpha=0.4, own_weight=own_weight)
    sizes = [30, 20, 10]
    net, data = projected(), images(*sizes)
    state, expected = [begin(net)] * 3, begin(net)
    for round_, warmth in ((0, 1 / 2), (1, 1.0)):
        state, record = fedsc_round(net, state, data, round_, 7, config, fedsc)
        released = []
        for i, (x, _) in enumerate(data):
            r = matrix(net, expected, x, fedsc, generator(7, "matrix", round_, i))
            noise = 0.01 * torch.randn(4, 4, generator=generator(7, "noise", round_, i))
            released.append(r + (noise + noise.T) / 2)
        after, losses = [], []
        for i, (x, _) in enumerate(data):
            alpha = {"falling": 1 - 0.6 * round_ / 4, "share": sizes[i] / 60}[own_weight]
            others = sum(sizes[j] * released[j] for j in range(3) if j != i) / (60 - sizes[i])
            theta = {key: value.clone().requires_grad_() for key, value in expected.items()}
            g = generator(7, "extractor", round_, i)
            torch.randint(2**62, (), generator=g)  # the seed for Dropout, which local_sgd draws first
            torch.manual_seed(0)
            rows = torch.randperm(len(x), generator=g)
            views = [VIEWS["crop"](x[rows], g) for _ in range(2)]
            z = [cap_length(torch.func.functional_call(net, theta, (view,)), 0.02) for view in views]
            loss = spectral_loss(*z, alpha, others)
            gradients = torch.autograd.grad(loss, list(theta.values()))
            length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            scale = min(1.0, 0.5 / (length + 1e-6))
            after.append(
                {
                    key: (value - 0.3 * warmth * (scale * gradient + 0.1 * value)).detach()
                    for (key, value), gradient in zip(theta.items(), gradients, strict=True)
                }
            )
            losses.append(loss.item())
        expected = {key: sum(n * s[key] for n, s in zip(sizes, after, strict=True)) / 60 for key in expected}
        for key, value in expected.items():
            assert torch.allclose(state[0][key], value, atol=1e-6), (round_, key)
        assert record.loss == pytest.approx(sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / 60, rel=1e-4)
        assert record.up == record.down == 3 * (size_bytes(expected) + 4 * 4 * 4)


def test_a_gradient_is_clipped_and_weights_decay():
    net, data = classifier(), labelled(6)
    plain = {"rounds": 1, "local_epochs": 1, "batch": 100, "momentum": 0, "warm_rounds": 0, "rate": 0.1}
    start = begin(net)
    after, _ = fedce_round(net, [start], data, 0, 0, ExtractorConfig(**plain, weight_decay=0, clip=0.01))
    moved = math.sqrt(sum((after[0][key] - start[key]).square().sum().item() for key in start))
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)
    decayed, _ = fedce_round(net, [start], data, 0, 0, ExtractorConfig(**plain, weight_decay=0.5, clip=0.01))
    for key in start:
        assert torch.allclose(decayed[0][key], after[0][key] - 0.1 * 0.5 * start[key], atol=1e-7)


def test_fedce_trains_on_the_configured_views():
    torch.manual_seed(0)
    net, ((x, _),) = Headed(Pixels(), nn.Linear(4, 3)), images(12)
    data = [(x, torch.randint(0, 3, (12,)))]
    heads = {
        views: fedce_round(net, [begin(net)], data, 0, 0, ExtractorConfig(views=views))[0][0]["head.weight"]
        for views in ("none", "shift", "strong")
    }
    assert not torch.equal(heads["none"], heads["shift"])
    assert not torch.equal(heads["shift"], heads["strong"])
