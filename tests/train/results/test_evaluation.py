from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nmoe_train.record import Inference
from nmoe_train.results.evaluation import (
    DeviceRows,
    answers,
    apply_class_mix,
    auc,
    evaluate,
    macro_f1,
    measure,
    measure_both,
)

g = torch.Generator().manual_seed(0)

ROWS = DeviceRows(
    scores=torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]),
    expert_outputs=torch.tensor([[[9.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.1, 0.0], [0.0, 2.0], [4.0, 0.0]]]),
    y=torch.tensor([0, 1]),
)


def test_a_row_goes_to_its_top_k_with_the_papers_softmax():
    p, routed = answers(ROWS, 0, Inference(2, "outputs"))
    weights = torch.tensor([3.0, 1.0]).softmax(0)
    expected = (weights[0] * ROWS.expert_outputs[0, 0] + weights[1] * ROWS.expert_outputs[0, 1]).softmax(0)
    assert torch.allclose(p[0], expected)
    assert routed.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    p, _ = answers(ROWS, 0, Inference(2, "probabilities"))
    expected = weights[0] * ROWS.expert_outputs[0, 0].softmax(0) + weights[1] * ROWS.expert_outputs[0, 1].softmax(0)
    assert torch.allclose(p[0], expected)


def test_a_row_with_a_confident_own_expert_is_answered_locally():
    p, routed = answers(ROWS, 0, Inference(1, "probabilities", 0.9))
    assert routed.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert torch.equal(p[0], ROWS.expert_outputs[0, 0].softmax(0))
    assert torch.equal(p[1], ROWS.expert_outputs[1, 2].softmax(0))


def test_macro_f1_matches_scikit_learn():
    from sklearn.metrics import f1_score

    predicted, y = torch.randint(0, 5, (200,), generator=g), torch.randint(0, 4, (200,), generator=g)
    reference = f1_score(y, predicted, labels=range(5), average="macro", zero_division=0)
    assert macro_f1(predicted, y, 5) == pytest.approx(reference)


def test_auc_matches_scikit_learn():
    from sklearn.metrics import roc_auc_score

    y = torch.randint(0, 4, (300,), generator=g)
    p = (torch.randn(300, 4, generator=g) + 2 * torch.eye(4)[y]).softmax(1)
    reference = roc_auc_score(y, p / p.sum(1, keepdim=True), multi_class="ovr", average="macro")
    assert reference > 0.8
    assert auc(p, y) == pytest.approx(reference)
    assert auc(p[y == 0], y[y == 0]) is None


def test_figures_are_averaged_over_devices_pooled_over_rows_and_listed_per_device():
    p = [torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[0.9, 0.1]] * 4)]
    y = [torch.tensor([0, 0]), torch.tensor([0, 1, 1, 1])]
    figures = measure(p, y)
    assert figures["devices"] == [1.0, 0.25]
    assert figures["accuracy"] == 0.625
    assert figures["pooled"]["accuracy"] == 0.5
    assert figures["macro_f1"] == pytest.approx((0.5 + 0.2) / 2)
    assert figures["auc"] == 0.5  # of the second alone: the first has one class


def test_the_share_kept_local_is_the_mean_diagonal_of_the_routing_matrix():
    result = evaluate([ROWS, ROWS], Inference(1, "probabilities"))
    assert result["routing"] == [[0.5, 0.0, 0.5]] * 2
    assert result["load"] == [0.5, 0.0, 0.5]
    assert result["kept_local"] == 0.25


def skewed_rows(rows=400, mix=(0.8, 0.1, 0.1), experts=3, seed=0):
    """Calibrated answers without a prior of `experts` experts, each with noise of its own, to rows of this mix."""
    torch.manual_seed(seed)
    y = torch.multinomial(torch.tensor(mix), rows, replacement=True)
    outputs = torch.randn(rows, experts, len(mix)) + torch.eye(len(mix))[y][:, None]
    return DeviceRows(torch.randn(rows, experts), outputs, y, 10 * torch.rand(rows))


ADAPTING = Inference(2, "probabilities", 0.6, adapt=True, familiar=5.0)


def test_every_method_is_measured_with_and_without_the_class_mix():
    """With one device the fleet is its own expert, so both figures are equal."""
    rows = skewed_rows(experts=1)
    found = evaluate([rows], Inference(1, "probabilities", adapt=True))
    assert found["networked"] == found["own_expert"]
    both = found["networked"]
    assert both["class_mix"] is True
    assert both["accuracy"] == both["with_class_mix"]["accuracy"] > both["without_class_mix"]["accuracy"] + 0.05
    plain = evaluate([rows], Inference(1, "probabilities"))["networked"]
    assert plain["accuracy"] == both["without_class_mix"]["accuracy"]
    assert {**plain, "class_mix": 0} != {**both, "class_mix": 0}
    assert plain["with_class_mix"] == both["with_class_mix"]


def test_answers_that_carry_a_prior_are_not_measured_with_a_class_mix():
    found = evaluate([skewed_rows(experts=1)], Inference(1, "probabilities"), prior=True)
    assert "with_class_mix" not in found["networked"]


def orders_of(y, seed):
    """Orders of the rows: random, sorted by class, 0, 1, 2, 0, 1, … as far as rows last, and two classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    by_class = [torch.nonzero(y == k)[:, 0] for k in range(int(y.max()) + 1)]
    longest = max(len(rows) for rows in by_class)
    turns = [rows[i] for i in range(longest) for rows in by_class if i < len(rows)]
    return [torch.randperm(len(y), generator=generator), y.argsort(stable=True), torch.stack(turns)]


@pytest.mark.parametrize("mix", [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_figure_depends_on_the_order_of_the_rows(mix, seed):
    rows = [skewed_rows(mix=mix, seed=10 * seed + device) for device in range(3)]
    seen = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    expected = evaluate(rows, ADAPTING, seen=seen)
    for number in range(3):
        ordered = []
        for part in rows:
            order = orders_of(part.y, seed)[number]
            ordered.append(
                DeviceRows(part.scores[order], part.expert_outputs[order], part.y[order], part.distances[order])
            )
        assert flat(evaluate(ordered, ADAPTING, seen=seen)) == pytest.approx(flat(expected), abs=1e-6)


def flat(value, name=""):
    """Every number of nested figures by its path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}.{i}").items()}
    return {name: value}


def test_a_file_of_two_alternating_classes_is_not_answered_wrongly():
    """The halves used to be the even and the odd rows: each half got the mix of the other class."""
    p = torch.tensor([[0.6, 0.4], [0.4, 0.6]] * 200)
    figures = measure_both([p], [torch.tensor([0, 1] * 200)], adapt=True)
    assert figures["accuracy"] == 1.0


def test_what_the_exit_does_with_unseen_classes_is_counted():
    outputs = torch.tensor([[[4.0, 0, 0], [0, 0, 4.0]]] * 4)  # expert 0 says class 0, expert 1 class 2
    rows = DeviceRows(torch.tensor([[0.0, 9.0]] * 4), outputs, torch.tensor([0, 2, 2, 1]), torch.tensor([1.0, 1, 9, 9]))
    seen = torch.tensor([[True, False, False]])
    rules = Inference(1, "probabilities", 0.5, familiar=2.0)
    assert evaluate([rows], rules, seen=seen)["unseen"] == {"rows": 3, "kept": pytest.approx(1 / 3), "right": 0.0}
    assert evaluate([rows], replace(rules, familiar=0.5), seen=seen)["unseen"]["right"] is None
    assert "unseen" not in evaluate([rows], replace(rules, local_first=None, familiar=None), seen=seen)
    assert "unseen" not in evaluate([rows], rules, seen=torch.ones(1, 3, dtype=torch.bool))


def test_a_confident_row_is_answered_locally_only_if_it_is_familiar():
    near = DeviceRows(ROWS.scores, ROWS.expert_outputs, ROWS.y, torch.tensor([1.0, 1.0]))
    _, routed = answers(near, 0, Inference(1, "probabilities", 0.5, familiar=2.0))
    assert routed[:, 0].tolist() == [1.0, 1.0]
    far = replace(near, distances=torch.tensor([1.0, 3.0]))
    _, routed = answers(far, 0, Inference(1, "probabilities", 0.5, familiar=2.0))
    assert routed[:, 0].tolist() == [1.0, 0.0]


def test_the_class_mix_is_multiplied_in_only_where_the_rules_adapt():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]] * 50)
    assert apply_class_mix(p, Inference(1, "probabilities")) is p
    mixed = apply_class_mix(p, Inference(1, "probabilities", adapt=True))
    assert (mixed[:, 0] >= p[:, 0]).all()
    assert torch.allclose(mixed.sum(1), torch.ones(100))


def test_a_row_counts_as_asked_when_any_other_expert_gets_it():
    result = evaluate([ROWS, ROWS], Inference(2, "outputs"))
    assert result["asked"] == 1.0
    assert evaluate([ROWS], Inference(2, "outputs", 0.9))["asked"] == 0.5
