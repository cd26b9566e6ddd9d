from __future__ import annotations

import pytest
import torch

from nmoe_train.results.evaluation import (
    DeviceRows,
    answers,
    apply_class_mix,
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


def test_em_finds_the_class_mix_of_unlabelled_answers():
    torch.manual_seed(0)
    mix = torch.tensor([0.7, 0.2, 0.1])
    y = torch.multinomial(mix, 4000, replacement=True)
    likelihood = (torch.randn(4000, 3) + 2 * torch.eye(3)[y]) * 2  # log p(x|y), up to a constant: N(2·1ᵧ, 1)
    assert torch.allclose(class_mix(likelihood.softmax(1)), mix, atol=0.03)


def test_the_class_mix_of_a_row_is_estimated_from_other_rows():
    """Even rows are of class 0 and odd rows of class 1; each half is weighted with the mix of the other half."""
    p = torch.full((40, 2), 0.5)
    p[::2], p[1::2] = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    weighted = apply_class_mix(p, Inference(1, "probabilities", adapt=True))
    assert weighted[0, 0] < 0.9
    assert weighted[1, 1] < 0.9
    assert torch.allclose(weighted.sum(1), torch.ones(40))
    assert apply_class_mix(p, Inference(1, "probabilities", adapt=False)) is p


def test_the_best_threshold_is_chosen_and_among_equals_the_one_with_most_local_answers():
    rules = Inference(1, "probabilities")
    right_locally = DeviceRows(
        torch.tensor([[0.0, 9.0]] * 4), torch.tensor([[[3.0, 0.0], [0.0, 3.0]]] * 4), torch.zeros(4, dtype=torch.long)
    )
    wrong_locally = DeviceRows(right_locally.scores, right_locally.expert_outputs, torch.ones(4, dtype=torch.long))
    assert choose_threshold([right_locally], [right_locally], rules) == 0.5
    assert choose_threshold([wrong_locally], [wrong_locally], rules) == 0.99  # its own expert has a confidence of 95 %


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


def test_an_expert_alone_gets_the_same_class_mix_as_the_fleet():
    """With one device the fleet is its own expert, so both figures are equal."""
    torch.manual_seed(0)
    y = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), 400, replacement=True)
    rows = DeviceRows(torch.zeros(400, 1), (torch.randn(400, 3) + torch.eye(3)[y])[:, None], y)
    result = evaluate([rows], Inference(1, "probabilities", adapt=True))
    assert result["networked"] == result["own_expert"]
    without = evaluate([rows], Inference(1, "probabilities"))
    assert without["networked"]["accuracy"] < result["networked"]["accuracy"]


def test_the_threshold_considers_own_rows_and_pooled_rows():
    """The local expert is right for own rows and wrong for pooled ones, with other confidences."""
    rules = Inference(1, "probabilities")

    def rows(confidence, label, n):
        logit = torch.tensor(confidence / (1 - confidence)).log().item()
        outputs = torch.tensor([[[logit, 0.0], [0.0, 9.0]]] * n)
        return DeviceRows(torch.tensor([[0.0, 9.0]] * n), outputs, torch.full((n,), label))

    confident = rows(0.93, 0, 4)
    assert (
        choose_threshold([confident], [rows(0.65, 1, 4)], rules) == 0.7
    )  # local for confident rows, remote for the others
    assert choose_threshold([confident], [rows(0.93, 1, 4)], rules) == 0.5  # a tie is answered locally
    assert choose_threshold([rows(0.65, 1, 4)], [rows(0.65, 1, 4)], rules) == 0.7


def test_an_absent_class_keeps_a_small_share():
    mix = class_mix(torch.tensor([[1.0, 0.0]] * 10))
    assert mix[1].item() == pytest.approx(0.5 / 11, rel=1e-3)


def test_a_row_counts_as_asked_when_any_other_expert_gets_it():
    result = evaluate([ROWS, ROWS], Inference(2, "outputs"))
    assert result["asked"] == 1.0
    assert evaluate([ROWS], Inference(2, "outputs", 0.9))["asked"] == 0.5
