"""Baselines match a plain training by hand."""

from __future__ import annotations

import pytest
import torch

from nmoe_train.data.clients import assign_samples
from nmoe_train.data.datasets import load
from nmoe_train.nets import build
from nmoe_train.pipeline import train, trainer_of
from nmoe_train.recipes import configure
from nmoe_train.results.baselines import baselines
from nmoe_train.run import read_run
from nmoe_train.stages.extractor import fedce_update
from nmoe_train.stages.federation import cosine, generator

FLAGS = {
    "data": {"clients": 3},
    "extractor": {"rounds": 12, "local_epochs": 1, "drop": 0.9, "share": 0.5, "step_limit": 1},
    "experts": {"epochs": 20},
    "gate": {"rounds": 1},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = train(configure(flags=FLAGS), tmp_path_factory.mktemp("baselines") / "run")
    return run, baselines(run)


def test_a_local_classifier_is_trained_by_one_client_and_gets_no_class_mix(made):
    run, found = made
    trainer, _ = trainer_of(run)
    config = configure(flags={**FLAGS, "extractor": {"rounds": 12, "local_epochs": 1}}).extractor
    clients = assign_samples(load("digits"), trainer.config.data, 0)
    torch.manual_seed(0)
    net = type(trainer.classifier)(type(trainer.classifier.extractor)(**trainer.specs.extractor.arguments), run.head(0))
    torch.manual_seed(0)
    net.extractor.load_state_dict(build(trainer.specs.extractor).state_dict())
    net.head.load_state_dict(build(trainer.specs.head).state_dict())
    x, y = clients.train[1]
    state = net.state_dict()
    for round_ in range(12):
        rate = config.rate * cosine(round_, 12, config.warm_rounds)
        state = fedce_update(net, state, 1, x, y, rate, config, generator(0, "extractor", round_, 1)).state
    net.load_state_dict(state)
    with torch.no_grad():
        right = (net.eval()(clients.test[0]).argmax(1) == clients.test[1]).double().mean().item()
    assert found["local"]["iid"]["devices"][1] == pytest.approx(right, abs=1e-6)


def test_a_centralised_mixture_knows_every_class(made):
    """It ignores drop, share and step_limit, and its experts use the extractor trained on all samples."""
    _, found = made
    assert found["centralised"]["iid"]["accuracy"] > max(0.7, found["local"]["iid"]["accuracy"] + 0.2)
    routing = torch.tensor(found["centralised"]["own"]["routing"])
    assert torch.allclose(routing.sum(1), torch.ones(3))
    assert found["centralised"]["own"]["kept_local"] == pytest.approx(routing.diag().mean().item())


def test_fedavg_is_the_runs_own_classifier_or_is_trained_for_it(made, tmp_path):
    run, found = made
    assert found["fedavg"]["iid"] == run.metrics["iid"]["fedce"]
    flags = {**FLAGS, "extractor": {"method": "fedsc", "rounds": 1, "local_epochs": 1}}
    fedsc = train(configure(flags=flags), tmp_path / "run")
    found = baselines(fedsc)
    assert found["fedavg"]["iid"]["accuracy"] > 0.7
    assert "fedce" not in read_run(tmp_path / "run").metrics["iid"]
