from __future__ import annotations

import pytest
import torch

from nmoe_train.results.evaluation import (
    DeviceRows,
    adapted,
    answers,
    auc,
    choose_threshold,
    class_mix,
    evaluate,
    macro_f1,
    measure,
)
from nmoe_train.run import Inference

g = torch.Generator().manual_seed(0)

ROWS = DeviceRows(
    scores=torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]),
    expert_outputs=torch.tensor([[[9.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.1, 0.0], [0.0, 2.0], [4.0, 0.0]]]),
    y=torch.tensor([0, 1]),
)


def test_a_row_goes_to_its_top_k_with_the_papers_softmax():
    p, went = answers(ROWS, 0, Inference(2, "outputs"))
    weights = torch.tensor([3.0, 1.0]).softmax(0)
    expected = (weights[0] * ROWS.expert_outputs[0, 0] + weights[1] * ROWS.expert_outputs[0, 1]).softmax(0)
    assert torch.allclose(p[0], expected)
    assert went.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    p, _ = answers(ROWS, 0, Inference(2, "probabilities"))
    expected = weights[0] * ROWS.expert_outputs[0, 0].softmax(0) + weights[1] * ROWS.expert_outputs[0, 1].softmax(0)
    assert torch.allclose(p[0], expected)


def test_a_row_that_its_own_expert_is_sure_of_stays_at_home():
    p, went = answers(ROWS, 0, Inference(1, "probabilities", 0.9))
    assert went.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert torch.equal(p[0], ROWS.expert_outputs[0, 0].softmax(0))
    assert torch.equal(p[1], ROWS.expert_outputs[1, 2].softmax(0))


def test_em_finds_the_class_mix_of_unlabelled_answers():
    torch.manual_seed(0)
    mix = torch.tensor([0.7, 0.2, 0.1])
    y = torch.multinomial(mix, 4000, replacement=True)
    likelihood = (torch.randn(4000, 3) + 2 * torch.eye(3)[y]) * 2  # log p(x|y), up to a constant: N(2·1ᵧ, 1)
    assert torch.allclose(class_mix(likelihood.softmax(1)), mix, atol=0.03)


def test_the_class_mix_of_a_row_is_estimated_from_other_rows():
    """Even rows are all of class 0, odd ones of class 1: each half is weighed with the other's mix."""
    p = torch.full((40, 2), 0.5)
    p[::2], p[1::2] = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    weighed = adapted(p, Inference(1, "probabilities", adapt=True))
    assert weighed[0, 0] < 0.9
    assert weighed[1, 1] < 0.9
    assert torch.allclose(weighed.sum(1), torch.ones(40))
    assert adapted(p, Inference(1, "probabilities", adapt=False)) is p


def test_the_threshold_is_the_best_and_of_equals_keeps_most_at_home():
    rules = Inference(1, "probabilities")
    right_at_home = DeviceRows(
        torch.tensor([[0.0, 9.0]] * 4), torch.tensor([[[3.0, 0.0], [0.0, 3.0]]] * 4), torch.zeros(4, dtype=torch.long)
    )
    wrong_at_home = DeviceRows(right_at_home.scores, right_at_home.expert_outputs, torch.ones(4, dtype=torch.long))
    assert choose_threshold([right_at_home], [right_at_home], rules) == 0.5
    assert choose_threshold([wrong_at_home], [wrong_at_home], rules) == 0.99  # its own expert is 95 % sure


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    predicted, y = torch.randint(0, 5, (200,), generator=g), torch.randint(0, 4, (200,), generator=g)
    reference = f1_score(y, predicted, labels=range(5), average="macro", zero_division=0)
    assert macro_f1(predicted, y, 5) == pytest.approx(reference)


def test_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    y = torch.randint(0, 4, (300,), generator=g)
    p = (torch.randn(300, 4, generator=g) + 2 * torch.eye(4)[y]).softmax(1)
    reference = roc_auc_score(y, p / p.sum(1, keepdim=True), multi_class="ovr", average="macro")
    assert reference > 0.8
    assert auc(p, y) == pytest.approx(reference)
    assert auc(p[y == 0], y[y == 0]) is None


def test_figures_are_the_devices_mean_and_pooled_and_each():
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


def test_an_expert_alone_gets_the_same_class_mix_as_the_fleet():
    """One device: the fleet is its expert, so the two figures are one."""
    torch.manual_seed(0)
    y = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), 400, replacement=True)
    rows = DeviceRows(torch.zeros(400, 1), (torch.randn(400, 3) + torch.eye(3)[y])[:, None], y)
    result = evaluate([rows], Inference(1, "probabilities", adapt=True))
    assert result["networked"] == result["own_expert"]
    without = evaluate([rows], Inference(1, "probabilities"))
    assert without["networked"]["accuracy"] < result["networked"]["accuracy"]


def test_the_threshold_minds_ones_own_rows_and_everybodys():
    """Own rows are right at home and wrong abroad, everybody's the other way round, with other confidences."""
    rules = Inference(1, "probabilities")

    def rows(confidence, label, n):
        logit = torch.tensor(confidence / (1 - confidence)).log().item()
        outputs = torch.tensor([[[logit, 0.0], [0.0, 9.0]]] * n)
        return DeviceRows(torch.tensor([[0.0, 9.0]] * n), outputs, torch.full((n,), label))

    surer = rows(0.93, 0, 4)
    assert choose_threshold([surer], [rows(0.65, 1, 4)], rules) == 0.7  # home for the sure, abroad for the others
    assert choose_threshold([surer], [rows(0.93, 1, 4)], rules) == 0.5  # a tie stays at home
    assert choose_threshold([rows(0.65, 1, 4)], [rows(0.65, 1, 4)], rules) == 0.7


def test_a_class_that_was_not_seen_keeps_a_small_share():
    mix = class_mix(torch.tensor([[1.0, 0.0]] * 10))
    assert mix[1].item() == pytest.approx(0.5 / 11, rel=1e-3)


def test_a_row_is_asked_of_others_when_any_other_expert_gets_it():
    result = evaluate([ROWS, ROWS], Inference(2, "outputs"))
    assert result["asked"] == 1.0
    assert evaluate([ROWS], Inference(2, "outputs", 0.9))["asked"] == 0.5
