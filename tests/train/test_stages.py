"""Each stage against a naive reference, and against what the paper says of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nmoe_train.config import ExpertsConfig, ExtractorConfig, GateConfig
from nmoe_train.errors import DivergedError
from nmoe_train.evaluate import Rows, Rules, answers, choose_threshold, class_mix, evaluate, macro_f1
from nmoe_train.experts import class_prior, train_experts
from nmoe_train.extractor import Classifier, fedce_round
from nmoe_train.federation import Update, average, check_losses, cosine, generator, participants
from nmoe_train.gate import (
    exported,
    fedgate_round,
    fresh_gate,
    load_loss,
    mixture_loss,
    random_gate,
    rollgate_stop,
    scores,
)

g = torch.Generator().manual_seed(0)


def test_one_seed_round_and_client_is_one_source_of_randomness():
    draws = [
        torch.rand(4, generator=generator(*key)).tolist()
        for key in [(0, "a", 1, 2), (0, "a", 1, 2), (0, "a", 2, 1), (1, "a", 1, 2)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


def test_seven_of_ten_clients_take_part():
    chosen = [participants(10, 0.7, 0, "gate", round_) for round_ in range(50)]
    assert all(len(set(part)) == 7 and part == sorted(part) for part in chosen)
    assert set().union(*chosen) == set(range(10))
    assert participants(3, 0.01, 0, "gate", 0)


def test_the_average_of_equal_models_is_the_model():
    state = {"w": torch.randn(3, 2, generator=g)}
    assert torch.allclose(average([Update(i, state, n, 0.0) for i, n in enumerate((1, 5, 9))])["w"], state["w"])


def test_the_average_weighs_by_client_size_whatever_the_order():
    updates = [
        Update(i, {"w": torch.full((2,), float(v))}, n, 0.0) for i, (v, n) in enumerate([(1, 1), (4, 2), (7, 7)])
    ]
    assert average(updates)["w"].tolist() == pytest.approx([5.8, 5.8])
    assert torch.equal(average(updates)["w"], average(updates[::-1])["w"])


def test_a_loss_that_is_no_number_names_round_and_client():
    with pytest.raises(DivergedError, match="gate, round 3: the loss of client 1 is nan"):
        check_losses("gate", 2, [Update(0, {}, 1, 1.0), Update(1, {}, 1, math.nan)])


def test_the_rate_warms_up_and_falls_like_a_cosine():
    rates = [cosine(round_, 10, 2) for round_ in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_one_round_of_fedce_is_sgd_and_an_average():
    """One local epoch of one full batch without momentum: θ - rate · Σ nᵢ/n ∇ᵢ."""
    torch.manual_seed(0)
    net = Classifier(nn.Linear(5, 4), nn.Linear(4, 3))
    data = [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in (6, 2)]
    config = ExtractorConfig(
        rounds=1, local_epochs=1, batch=100, momentum=0, weight_decay=0, clip=1e9, warm_rounds=0, rate=0.1
    )
    start = {key: value.detach() for key, value in net.state_dict().items()}
    after, _ = fedce_round(net, [start] * 2, data, 0, 0, config)
    loss = sum(len(y) / 8 * nn.functional.cross_entropy(net(x), y) for x, y in data)
    for (key, value), gradient in zip(
        net.named_parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
    ):
        assert torch.allclose(after[0][key], value - 0.1 * gradient, atol=1e-6)
        assert after[0][key] is after[1][key]


def test_batch_statistics_are_learned_and_averaged_and_counters_kept():
    torch.manual_seed(0)
    net = Classifier(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3)).eval()
    data = [(torch.randn(8, 5) + i, torch.randint(0, 3, (8,))) for i in range(2)]
    start = {key: value.detach().clone() for key, value in net.state_dict().items()}
    after, _ = fedce_round(net, [start] * 2, data, 0, 0, ExtractorConfig(batch=8, local_epochs=1, rounds=1))
    assert not torch.equal(after[0]["extractor.1.running_mean"], start["extractor.1.running_mean"])
    assert after[0]["extractor.1.num_batches_tracked"].item() == 1
    assert start["extractor.1.num_batches_tracked"].item() == 0


def test_local_heads_stay_with_their_clients():
    torch.manual_seed(0)
    net = Classifier(nn.Linear(5, 4), nn.Linear(4, 3))
    data = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(3)]
    start = {key: value.detach() for key, value in net.state_dict().items()}
    after, _ = fedce_round(net, [start] * 3, data, 0, 0, ExtractorConfig(heads="local", rounds=2))
    assert torch.equal(after[0]["extractor.weight"], after[2]["extractor.weight"])
    assert not torch.equal(after[0]["head.weight"], after[2]["head.weight"])


def test_clients_that_do_not_take_part_change_nothing_of_their_own():
    gates = [fresh_gate(4, 3) for _ in range(3)]
    data = [(torch.randn(9, 4), torch.randn(9, 3, 5), torch.randint(0, 5, (9,))) for _ in range(3)]
    config = GateConfig(share=0.3, rounds=2)
    (active,) = participants(3, 0.3, 0, "gate", 0)
    after, _ = fedgate_round(gates, data, 0, 0, config)
    for client in range(3):
        assert (after[client]["own"].abs().sum() > 0) == (client == active)
        assert torch.equal(after[client]["weight"], after[active]["weight"])


def test_full_synchronisation_leaves_no_gate_of_ones_own():
    data = [(torch.randn(9, 4), torch.randn(9, 3, 5), torch.randint(0, 5, (9,))) for _ in range(3)]
    after, _ = fedgate_round([fresh_gate(4, 3)] * 3, data, 0, 0, GateConfig(synchronise="all", rounds=2))
    assert not any(gate["own"].any() for gate in after)


def test_stacked_experts_are_those_trained_one_by_one():
    """Clients of unequal size: stacking must not let one's samples reach another."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    starts = [{k: v.detach().clone() + 0.01 * i for k, v in net.state_dict().items()} for i in range(3)]
    data = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (20, 20, 20)]
    config = ExpertsConfig(epochs=3, batch=5)
    together, _ = train_experts(net, starts, data, 3, 0, config)
    changed = [data[0], (torch.randn(20, 4), data[1][1]), data[2]]
    others, _ = train_experts(net, starts, changed, 3, 0, config)
    for key in together[0]:
        assert torch.allclose(together[0][key], others[0][key], atol=1e-6)
        assert torch.allclose(together[2][key], others[2][key], atol=1e-6)
        assert not torch.allclose(together[1][key], others[1][key])


def test_an_adjusted_expert_leaves_its_clients_habit_out():
    """Latents that say nothing: a plain expert learns the class mix, an adjusted one learns that it knows nothing."""
    torch.manual_seed(0)
    net = nn.Linear(2, 3)
    y = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    data, start = [(torch.zeros(100, 2), y)], {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    said = {}
    for loss in ("plain", "adjusted"):
        (state,), _ = train_experts(
            net, [start], data, 3, 0, ExpertsConfig(loss=loss, epochs=200, rate=0.02, weight_decay=0)
        )
        said[loss] = state["bias"].softmax(0)
    assert torch.allclose(said["plain"], class_prior(y, 3), atol=0.04)
    assert torch.allclose(said["adjusted"], torch.full((3,), 1 / 3), atol=0.04)


def test_the_mixture_losses_are_the_logs_they_say():
    torch.manual_seed(1)
    gate, outputs, y = torch.randn(6, 4).softmax(1), torch.randn(6, 4, 5), torch.randint(0, 5, (6,))
    by_hand = [-math.log(sum(gate[b, j] * outputs[b, j].softmax(0)[y[b]] for j in range(4))) for b in range(6)]
    assert mixture_loss(gate, outputs, y, "probabilities").item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    by_hand = [-math.log(sum(gate[b, j] * outputs[b, j] for j in range(4)).softmax(0)[y[b]]) for b in range(6)]
    assert mixture_loss(gate, outputs, y, "outputs").item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_the_load_loss_is_one_when_balanced_and_n_when_one_expert_gets_all():
    assert load_loss(torch.eye(4).repeat(3, 1)).item() == pytest.approx(1.0)
    assert load_loss(torch.eye(4)[:1].repeat(8, 1)).item() == pytest.approx(4.0)


def test_a_unit_step_has_the_length_of_the_rate_and_a_clipped_one_at_most():
    data = [(torch.randn(9, 4), 5 * torch.randn(9, 3, 5), torch.randint(0, 5, (9,)))]
    for step in ("unit", "clipped"):
        after, _ = fedgate_round([fresh_gate(4, 3)], data, 0, 0, GateConfig(step=step, rounds=1, rate=0.05))
        length = math.sqrt(sum(value.square().sum().item() for value in after[0].values()))
        assert length == pytest.approx(0.05, rel=1e-4) if step == "unit" else length <= 0.05 * 1.0001


def test_what_is_exported_scores_as_the_gate_did():
    gate = {"weight": torch.randn(3, 4), "bias": torch.randn(3), "own": torch.randn(3)}
    layer, h = nn.Linear(4, 3), torch.randn(5, 4)
    layer.load_state_dict(exported(gate))
    assert torch.allclose(layer(h), scores(gate, h), atol=1e-6)


def test_rangate_is_its_seeds_and_spreads_over_all_experts():
    h = torch.nn.functional.layer_norm(torch.randn(4000, 32, generator=g), (32,))
    share = torch.bincount(scores(random_gate(32, 8, 5), h).argmax(1), minlength=8) / 4000
    assert share.min() > 0.04
    assert torch.equal(random_gate(32, 8, 5)["weight"], random_gate(32, 8, 5)["weight"])


def test_rollgate_learns_whose_latents_are_whose():
    torch.manual_seed(0)
    centres = 3 * torch.eye(3)
    data = [
        (centres[i] + 0.1 * torch.randn(60, 3), torch.zeros(60, 3, 2), torch.zeros(60, dtype=torch.long))
        for i in range(3)
    ]
    gates = [fresh_gate(3, 3)] * 3
    config = GateConfig(method="rollgate", laps=6, rate=0.2)
    for stop in range(18):
        gates, _ = rollgate_stop(gates, data, stop, 0, config)
    for client, (h, _, _) in enumerate(data):
        assert (scores(gates[0], h).argmax(1) == client).float().mean() > 0.95


ROWS = Rows(
    scores=torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]),
    outputs=torch.tensor([[[9.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.1, 0.0], [0.0, 2.0], [4.0, 0.0]]]),
    y=torch.tensor([0, 1]),
)


def test_a_row_goes_to_its_top_k_with_the_papers_softmax():
    p, went = answers(ROWS, 0, Rules(2, "outputs", None, False))
    weights = torch.tensor([3.0, 1.0]).softmax(0)
    expected = (weights[0] * ROWS.outputs[0, 0] + weights[1] * ROWS.outputs[0, 1]).softmax(0)
    assert torch.allclose(p[0], expected)
    assert went.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]


def test_a_row_that_its_own_expert_is_sure_of_stays_at_home():
    _, went = answers(ROWS, 0, Rules(1, "probabilities", 0.9, False))
    assert went.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_em_finds_the_class_mix_of_unlabelled_answers():
    torch.manual_seed(0)
    mix = torch.tensor([0.7, 0.2, 0.1])
    y = torch.multinomial(mix, 4000, replacement=True)
    likelihood = (torch.randn(4000, 3) + 2 * torch.eye(3)[y]) * 2  # log p(x|y), up to a constant: N(2·1ᵧ, 1)
    assert torch.allclose(class_mix(likelihood.softmax(1)), mix, atol=0.03)


def test_a_device_adapts_only_when_it_has_seen_enough():
    few, many = (
        Rows(torch.zeros(n, 1), torch.tensor([[[1.0, 0.0]]]).repeat(n, 1, 1), torch.zeros(n, dtype=torch.long))
        for n in (199, 200)
    )
    plain, adapted = Rules(1, "probabilities", None, False), Rules(1, "probabilities", None, True)
    assert torch.equal(answers(few, 0, plain)[0], answers(few, 0, adapted)[0])
    assert answers(many, 0, adapted)[0][0, 0] > answers(many, 0, plain)[0][0, 0]


def test_the_threshold_is_the_best_and_of_equals_keeps_most_at_home():
    rules = Rules(1, "probabilities", None, False)
    right_at_home = Rows(
        torch.tensor([[0.0, 9.0]] * 4), torch.tensor([[[3.0, 0.0], [0.0, 3.0]]] * 4), torch.zeros(4, dtype=torch.long)
    )
    wrong_at_home = Rows(right_at_home.scores, right_at_home.outputs, torch.ones(4, dtype=torch.long))
    assert choose_threshold([right_at_home], [right_at_home], rules) == 0.5
    assert choose_threshold([wrong_at_home], [wrong_at_home], rules) == 0.99


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    predicted, y = torch.randint(0, 5, (200,), generator=g), torch.randint(0, 4, (200,), generator=g)
    reference = f1_score(y, predicted, labels=range(5), average="macro", zero_division=0)
    assert macro_f1(predicted, y, 5) == pytest.approx(reference)


def test_the_share_kept_local_is_the_mean_diagonal_of_the_routing_matrix():
    result = evaluate([ROWS, ROWS], [ROWS, ROWS], Rules(1, "probabilities", None, False))
    assert result["own"]["routing"] == [[0.5, 0.0, 0.5]] * 2
    assert result["own"]["kept_local"] == 0.25


def test_an_expert_alone_gets_the_same_class_mix_as_the_fleet():
    """One device: the fleet is its expert, so the two figures are one."""
    torch.manual_seed(0)
    y = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), 400, replacement=True)
    rows = Rows(torch.zeros(400, 1), (torch.randn(400, 3) + torch.eye(3)[y])[:, None], y)
    result = evaluate([rows], [rows], Rules(1, "probabilities", None, True))
    assert result["own"]["networked"] == result["own"]["own_expert"]
