from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
import torch
from torch.distributions import MultivariateNormal

from nmoe_edge.models import Graph
from nmoe_export.graphs import export_graph
from nmoe_train.config import Config, DataConfig, GateConfig
from nmoe_train.errors import RunError
from nmoe_train.nets import build
from nmoe_train.stages.statgate import TEMPERATURES, assemble, fit_temperature, gate_of, network, statgate_round
from nmoe_train.stages.statistics import Statistics, client_statistics

DIM = 6
CLASSES = 4
EVERY_FORM = [
    {"statistics": "moments"},
    {"statistics": "means"},
    {"statistics": "moments", "shrink": 1.0},
    {"statistics": "means", "shrink": 1.0},
    {"statistics": "moments", "shrink": 0.0},
    {"statistics": "moments", "covariance": "diagonal"},
    {"statistics": "means", "covariance": "diagonal"},
    {"statistics": "means", "covariance": "diagonal", "shrink": 1.0},
]


def config(statistics="moments", **settings):
    return GateConfig(method="statgate", statistics=statistics, **settings)


def latents(client, rows=60):
    """Every client's latents lie elsewhere, and in another shape."""
    g = torch.Generator().manual_seed(client)
    h = torch.randn(rows, DIM, generator=g) @ torch.randn(DIM, DIM, generator=g) + 3 * torch.randn(DIM, generator=g)
    return h, torch.randint(0, CLASSES - 1, (rows,), generator=g)  # nobody has the last class


def published(settings, clients=range(3), rows=60):
    return [client_statistics(*latents(i, rows), CLASSES, settings, 0, i) for i in clients]


def scores(gate, h):
    with torch.no_grad():
        return gate(h)


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_scores_are_log_likelihoods_up_to_a_term_that_all_experts_share(form):
    settings = config(**form)
    clients = published(settings)
    h = torch.cat([latents(i)[0] for i in range(3)])
    covariances = [one.spread.double() for one in clients]
    covariances = [torch.diag(c) if c.ndim == 1 else c for c in covariances]
    even = settings.ridge * sum(covariances).trace() / 3 / DIM * torch.eye(DIM)
    pooled = sum(covariances) / 3 + even
    expected = []
    for one, own in zip(clients, covariances, strict=True):
        s = (1 - settings.shrink) * (own + even) + settings.shrink * pooled
        known = one.shares > 0
        groups = [MultivariateNormal(mean, s).log_prob(h.double()) for mean in one.means[known].double()]
        expected.append((torch.stack(groups, 1) + one.shares[known].log()).logsumexp(1))
    expected = torch.stack(expected, 1)
    found = scores(gate_of(clients, settings), h).double()
    assert torch.allclose(found.diff(dim=1), expected.diff(dim=1), rtol=1e-4, atol=1e-3)


def test_of_many_directions_those_are_kept_in_which_a_client_differs_most():
    spread = torch.eye(DIM).repeat(2, 1, 1)
    spread[0, 2, 2] = 9.0
    clients = [Statistics(50, torch.ones(1), torch.zeros(1, DIM), one) for one in spread]
    settings = config(rank=1, ridge=1e-6, shrink=0.0)
    h = torch.randn(200, DIM)
    along, full = (scores(gate_of(clients, config(rank=r, ridge=1e-6, shrink=0.0)), h) for r in (1, DIM))
    assert network(clients, settings).arguments["rank"] == 1
    assert torch.allclose(along.diff(dim=1), full.diff(dim=1), atol=1e-3)
    assert full.diff(dim=1).std() > 0.5


def test_a_gate_finds_the_client_that_a_latent_is_from():
    for statistics in ("means", "moments"):
        gate = gate_of(published(config(statistics=statistics)), config(statistics=statistics))
        for client in range(3):
            assert (scores(gate, latents(client)[0]).argmax(1) == client).double().mean() > 0.9


def test_a_new_client_adds_a_score_and_changes_nothing_that_others_published():
    settings = config()
    ten = published(settings, range(10))
    before = [one.means.clone() for one in ten]
    eleven = [*ten, *published(settings, [10])]
    gate = gate_of(eleven, settings)
    assert all(torch.equal(one.means, mean) for one, mean in zip(ten, before, strict=True))
    assert scores(gate, latents(10)[0]).shape[1] == 11
    assert (scores(gate, latents(10)[0]).argmax(1) == 10).double().mean() > 0.9
    for client in range(10):
        h = latents(client)[0]
        same = scores(gate, h).argmax(1) == scores(gate_of(ten, settings), h).argmax(1)
        assert same.double().mean() > 0.9


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_a_gate_is_exported_as_a_graph_of_basic_operators_that_computes_the_same(form):
    settings = config(**form)
    gate = gate_of(published(settings), settings, temperature=4.0)
    graph = export_graph(gate, "gate", torch.zeros(2, DIM))
    model = onnx.load(io.BytesIO(graph))
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 18)])
    h = torch.cat([latents(i)[0] for i in range(3)])
    found = Graph("gate", graph, (DIM,), (3,))(h.numpy())
    assert np.allclose(found, scores(gate, h).numpy(), rtol=1e-4, atol=1e-4)


def test_the_network_of_the_configuration_takes_the_weights_of_the_statistics():
    for form in EVERY_FORM:
        settings = config(**form)
        whole = Config(gate=settings, data=DataConfig(clients=3))
        spec = network(published(settings), settings)
        assert {**whole.gate_net(CLASSES).arguments, "dim": DIM, "rank": 0} == {**spec.arguments, "rank": 0}
        build(spec).load_state_dict(assemble(published(settings), settings))


def test_a_temperature_is_found_for_scores_that_are_too_sure():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=g)
    clients = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    assert fit_temperature(8 * logits, clients) == 8.0
    assert fit_temperature(logits, clients) == 1.0
    assert fit_temperature(1e6 * logits, clients) == TEMPERATURES[-1]


def test_the_round_fits_the_temperature_on_held_out_rows_and_counts_every_byte():
    settings = config()
    clients = published(settings)
    state, finished = statgate_round(clients, [latents(i)[0] for i in range(3)], settings)
    row = 8 + 4 * (1 + DIM + DIM * (DIM + 1) // 2)
    losses = 4 * len(TEMPERATURES)
    assert (finished.up, finished.down) == (3 * (row + losses), 3 * (2 * row + 4))
    assert (finished.stage, finished.round, finished.rounds, finished.epsilon) == ("gate", 1, 1, None)
    assert 1 / float(state["sharpness"]) in TEMPERATURES
    fixed, without = statgate_round(clients, [latents(i)[0] for i in range(3)], config(temperature=3.0))
    assert float(fixed["sharpness"]) == pytest.approx(1 / 3)
    assert (without.up, without.down) == (3 * row, 3 * 2 * row)


def test_clients_with_one_row_or_one_class_are_taken_in():
    for form in EVERY_FORM:
        settings = config(**form)
        h, y = latents(0)
        clients = [
            client_statistics(h[:1], y[:1], CLASSES, settings, 0, 0),
            client_statistics(h, torch.zeros_like(y), CLASSES, settings, 0, 1),
            client_statistics(*latents(2), CLASSES, settings, 0, 2),
        ]
        assert scores(gate_of(clients, settings), h).isfinite().all()


def test_statistics_without_any_variance_are_refused():
    h = torch.ones(9, DIM)
    clients = [client_statistics(h, torch.zeros(9, dtype=torch.long), CLASSES, config(), 0, i) for i in range(2)]
    with pytest.raises(RunError, match="latents of every client are all equal"):
        gate_of(clients, config())


def test_statistics_of_different_shapes_are_refused():
    mixed = [*published(config(statistics="means"), [0]), *published(config(), [1])]
    with pytest.raises(RunError, match="different shapes"):
        gate_of(mixed, config())


def test_a_latent_with_a_constant_number_does_not_make_the_gate_singular():
    """LayerNorm makes the numbers of a latent sum to 0: every covariance is singular."""
    settings = config(shrink=0.0)
    parts = [latents(i) for i in range(3)]
    flat = [(h - h.mean(1, keepdim=True), y) for h, y in parts]
    clients = [client_statistics(h, y, CLASSES, settings, 0, i) for i, (h, y) in enumerate(flat)]
    found = scores(gate_of(clients, settings), flat[1][0])
    assert found.isfinite().all()
    assert (found.argmax(1) == 1).double().mean() > 0.9
