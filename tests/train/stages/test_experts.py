from __future__ import annotations

import pytest
import torch
from torch import nn

from nmoe_train.config import ExpertsConfig
from nmoe_train.errors import DivergedError
from nmoe_train.stages.experts import class_prior, train_experts


def test_experts_trained_together_do_not_influence_each_other():
    """Clients of unequal size: changing the samples of one changes its expert and no other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    starts = [{k: v.detach().clone() + 0.01 * i for k, v in net.state_dict().items()} for i in range(3)]
    data = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (20, 7, 13)]
    config = ExpertsConfig(epochs=3, batch=5)
    together, _ = train_experts(net, starts, data, 3, 0, config)
    changed = [data[0], (torch.randn(7, 4), data[1][1]), data[2]]
    others, _ = train_experts(net, starts, changed, 3, 0, config)
    for key in together[0]:
        assert torch.allclose(together[0][key], others[0][key], atol=1e-6)
        assert torch.allclose(together[2][key], others[2][key], atol=1e-6)
        assert not torch.allclose(together[1][key], others[1][key])


def test_an_epoch_sees_every_sample_in_a_new_order():
    """One weight per sample and batches of one: after an epoch every sample has moved its own weight."""
    net = nn.Linear(6, 2, bias=False)
    start = {"weight": torch.zeros(2, 6)}
    data = [(torch.eye(6), torch.tensor([0, 1, 0, 1, 0, 1]))]
    (one,), record = train_experts(net, [start], data, 2, 0, ExpertsConfig(epochs=1, batch=1, weight_decay=0))
    assert (one["weight"].abs().min(0).values > 0).all()
    assert record.round == record.rounds == 1
    (other,), _ = train_experts(net, [start], data, 2, 1, ExpertsConfig(epochs=1, batch=1, weight_decay=0))
    assert not torch.equal(one["weight"], other["weight"])  # another seed, another order


def test_the_reported_loss_is_the_mean_over_the_epoch():
    """With a rate close to zero the mean over all batches is the loss of the initial weights."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
    start = {key: value.detach() for key, value in net.state_dict().items()}
    config = ExpertsConfig(epochs=1, batch=10, rate=1e-12, loss="plain", weight_decay=0)
    _, record = train_experts(net, [start], [(x, y)], 2, 0, config)
    assert record.loss == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), rel=1e-5)
    assert record.accuracy == pytest.approx((net(x).argmax(1) == y).float().mean().item())


def test_progress_is_called_after_every_epoch_but_the_last():
    net = nn.Linear(2, 2)
    records = []
    start = {key: value.detach() for key, value in net.state_dict().items()}
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
    _, last = train_experts(net, [start], data, 2, 0, ExpertsConfig(epochs=3), records.append)
    assert [record.round for record in (*records, last)] == [1, 2, 3]


def test_an_adjusted_expert_does_not_learn_its_clients_class_mix():
    """The latents carry no information: a plain expert learns the class mix, an adjusted one learns 1/K."""
    torch.manual_seed(0)
    net = nn.Linear(2, 3)
    y = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    data, start = [(torch.zeros(100, 2), y)], {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    learned = {}
    for loss in ("plain", "adjusted"):
        (state,), _ = train_experts(
            net, [start], data, 3, 0, ExpertsConfig(loss=loss, epochs=200, rate=0.02, weight_decay=0)
        )
        learned[loss] = state["bias"].softmax(0)
    assert torch.allclose(learned["plain"], class_prior(y, 3), atol=0.04)
    assert torch.allclose(learned["adjusted"], torch.full((3,), 1 / 3), atol=0.04)


def test_nan_latents_raise_an_error_that_names_the_client():
    net = nn.Linear(2, 2)
    start = {key: value.detach() for key, value in net.state_dict().items()}
    good = (torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(DivergedError, match="experts, round 1, client 1"):
        train_experts(net, [start] * 2, [good, (good[0] * torch.nan, good[1])], 2, 0, ExpertsConfig(epochs=2))


def test_experts_train_with_adamw_and_a_cosine_schedule():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    start = {key: value.detach().clone() for key, value in net.state_dict().items()}
    config = ExpertsConfig(epochs=4, batch=8, rate=0.05, weight_decay=0.1)
    ((state,), _) = train_experts(net, [start], [(x, y)], 2, 0, config)
    optimiser = torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4)
    for _ in range(4):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x) + class_prior(y, 2).log(), y).backward()
        optimiser.step()
        schedule.step()
    assert torch.allclose(state["weight"], net.weight, atol=1e-6)


def test_without_epochs_the_initial_weights_are_the_experts():
    net = nn.Linear(2, 2)
    starts = [{"weight": torch.full((2, 2), float(i)), "bias": torch.zeros(2)} for i in range(2)]
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))] * 2
    states, record = train_experts(net, starts, data, 2, 0, ExpertsConfig(epochs=0), pytest.fail)
    assert [state["weight"].mean().item() for state in states] == [0, 1]
    assert (record.loss, record.round, record.rounds) == (None, 1, 1)
