"""Every formula matches a naive reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nmoe_train.stages.losses import cap_length, correlation, load_loss, means_of_others, mixture_loss, spectral_loss

g = torch.Generator().manual_seed(3)


def rows(*shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_rows_longer_than_the_root_of_the_radius_are_cut_and_shorter_ones_kept():
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(cap_length(z, 4.0), torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]))


def test_a_correlation_matrix_is_the_mean_of_outer_products():
    z = rows(7, 3)
    naive = sum(torch.outer(row, row) for row in z) / 7
    assert torch.allclose(correlation(z), naive, atol=1e-12)


def test_the_spectral_loss_matches_the_traces_of_the_paper():
    one, two = rows(6, 4), rows(6, 4)
    others, alpha = correlation(rows(9, 4)), 0.3
    plus = sum((torch.outer(a, b) + torch.outer(b, a)) / 2 for a, b in zip(one, two, strict=True)) / 6
    r = sum(torch.outer(a, a) + torch.outer(b, b) for a, b in zip(one, two, strict=True)) / 12
    naive = -2 * torch.trace(plus) + alpha * torch.trace(r @ r) + 2 * (1 - alpha) * torch.trace(r @ others)
    assert spectral_loss(one, two, alpha, others).item() == pytest.approx(naive.item(), abs=1e-6)


def test_the_mean_of_the_other_matrices_is_weighted_by_client_size():
    matrices, sizes = [rows(3, 3) for _ in range(3)], [1, 2, 7]
    c = means_of_others(matrices, sizes)
    assert torch.allclose(c[0], (2 * matrices[1] + 7 * matrices[2]) / 9, atol=1e-6)
    assert torch.allclose(c[2], (matrices[0] + 2 * matrices[1]) / 3, atol=1e-6)
    assert not means_of_others(matrices[:1], [5])[0].any()


def test_with_alpha_equal_to_q_the_local_gradients_add_up_to_the_global_gradient():
    """Σᵢ qᵢ ∇Lᵢ with α = qᵢ is the gradient of -2 Σ qᵢ tr(Rᵢ⁺) + tr((Σ qᵢ Rᵢ)²)."""
    sizes = [4, 6, 10]
    q = [n / 20 for n in sizes]
    theta = rows(5, 3).requires_grad_()
    views = [(rows(n, 5), rows(n, 5)) for n in sizes]
    z = [(a @ theta, b @ theta) for a, b in views]
    mixed = sum(qi * (correlation(a) + correlation(b)) / 2 for qi, (a, b) in zip(q, z, strict=True))
    alike = sum(qi * (a * b).sum(1).mean() for qi, (a, b) in zip(q, z, strict=True))
    (whole,) = torch.autograd.grad(-2 * alike + mixed.square().sum(), theta, retain_graph=True)
    others = means_of_others([((correlation(a) + correlation(b)) / 2).detach() for a, b in z], sizes)
    local = sum(qi * spectral_loss(a, b, qi, c) for qi, (a, b), c in zip(q, z, others, strict=True))
    (parts,) = torch.autograd.grad(local, theta)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_the_mixture_losses_match_their_formulae():
    gate, outputs = rows(6, 4).softmax(1), rows(6, 4, 5)
    y = torch.randint(0, 5, (6,), generator=g)
    log_p = outputs.log_softmax(2)[torch.arange(6), :, y]
    naive = [-math.log(sum(gate[b, j] * outputs[b, j].softmax(0)[y[b]] for j in range(4))) for b in range(6)]
    assert mixture_loss(gate.log(), log_p, y, "probabilities").tolist() == pytest.approx(naive, abs=1e-6)
    naive = [-math.log(sum(gate[b, j] * outputs[b, j] for j in range(4)).softmax(0)[y[b]]) for b in range(6)]
    assert mixture_loss(gate.log(), outputs, y, "outputs").tolist() == pytest.approx(naive, abs=1e-6)
    naive = [-sum(float(gate[b, j] * log_p[b, j]) for j in range(4)) for b in range(6)]
    assert mixture_loss(gate.log(), log_p, y, "expected").tolist() == pytest.approx(naive, abs=1e-6)


def test_the_mixture_loss_accepts_stacked_clients():
    log_g, outputs = rows(2, 6, 4).log_softmax(2), rows(2, 6, 4, 5)
    y = torch.randint(0, 5, (2, 6), generator=g)
    together = mixture_loss(log_g, outputs, y, "outputs")
    assert torch.allclose(together[1], mixture_loss(log_g[1], outputs[1], y[1], "outputs"))


def test_a_gate_that_is_certain_of_a_wrong_expert_has_a_finite_gradient():
    scores = torch.tensor([[200.0, 0.0]], requires_grad=True)
    log_p = torch.tensor([[-400.0, 0.0]])
    mixture_loss(scores.log_softmax(1), log_p, torch.zeros(1, dtype=torch.long), "probabilities").sum().backward()
    assert scores.grad.isfinite().all()


def test_the_load_loss_is_1_when_balanced_and_n_when_one_expert_gets_every_row():
    assert load_loss(torch.eye(4).repeat(3, 1), torch.ones(12)).item() == pytest.approx(1.0)
    assert load_loss(torch.eye(4)[:1].repeat(8, 1), torch.ones(8)).item() == pytest.approx(4.0)


def test_the_load_loss_ignores_padding():
    one_sided = torch.eye(4)[:1].repeat(8, 1)
    padded = torch.cat([torch.eye(4), one_sided])
    assert load_loss(padded, torch.cat([torch.ones(4), torch.zeros(8)])).item() == pytest.approx(1.0)
