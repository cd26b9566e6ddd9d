"""Baselines match a plain training by hand."""

from __future__ import annotations

import shutil

import pytest
import torch

from nmoe_train.data.clients import assign_samples
from nmoe_train.data.datasets import load
from nmoe_train.errors import ConfigError
from nmoe_train.nets import build
from nmoe_train.pipeline import config_of, train, trainer_of
from nmoe_train.recipes import configure
from nmoe_train.results.baselines import METHODS, RIVALS, baselines
from nmoe_train.results.pages.formats import BASELINES
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


def test_fedavg_is_the_runs_own_classifier_without_a_class_mix(made):
    run, found = made
    clients = assign_samples(load("digits"), config_of(run).data, 0)
    with torch.no_grad():
        right = (run.head(0)(run.extractor()(clients.test[0])).argmax(1) == clients.test[1]).double().mean().item()
    assert found["fedavg"]["iid"]["accuracy"] == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("extractor", [{"method": "fedsc"}, {"loss": "adjusted"}])
def test_fedavg_is_trained_when_the_run_has_no_plain_classifier(tmp_path, extractor):
    flags = {**FLAGS, "extractor": {**extractor, "rounds": 1, "local_epochs": 1}}
    run = train(configure(flags=flags), tmp_path / "run")
    seen = set()
    found = baselines(run, lambda finished: seen.add(finished.stage), ["fedavg"])
    assert seen == {"fedavg"}
    assert set(found) == {"fedavg", "fedavg_prior"}
    if extractor == {"method": "fedsc"}:
        assert found["fedavg"]["iid"]["accuracy"] > 0.7
        assert "fedce" not in read_run(tmp_path / "run").metrics["iid"]


def test_the_class_mix_of_own_rows_is_that_of_the_training_labels(made):
    run, found = made
    clients = assign_samples(load("digits"), config_of(run).data, 0)
    mixes = [torch.bincount(y, minlength=10) + 0.5 for _, y in clients.train]
    mixes = [mix / mix.sum() for mix in mixes]
    pooled = torch.bincount(torch.cat([y for _, y in clients.train]), minlength=10) + 0.5
    accuracies = []
    for mix, (x, y) in zip(mixes, clients.own_test, strict=True):
        with torch.no_grad():
            p = run.head(0)(run.extractor()(x)).softmax(1)
        accuracies.append(((p * mix / pooled).argmax(1) == y).double().mean().item())
    assert found["fedavg_prior"]["own"]["devices"] == pytest.approx(accuracies, abs=1e-6)


def test_every_method_has_figures_and_those_with_settings_say_what_was_chosen(made):
    _, found = made
    assert tuple(found) == (
        "local",
        "fedavg",
        "fedavg_prior",
        "fedavg_tuned",
        "fedrep",
        "ditto",
        "lda",
        "lda_prior",
        "centralised",
    )
    assert set(found) == set(METHODS) | set(RIVALS) == set(BASELINES)
    for figures in found.values():
        assert 0 < figures["own"]["macro_f1"] <= 1
        assert 0.5 < figures["iid"]["auc"] <= 1
    ditto = found["ditto"]["chosen"]
    assert ditto["held_out"][str(ditto["lambda"])] == max(ditto["held_out"].values())
    tuned = found["fedavg_tuned"]["chosen"]
    assert tuned["held_out"][str(tuned["epochs"])] == max(tuned["held_out"].values())


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["fedavg_tuned", "fedrep", "ditto"])
def test_baselines_that_stop_after_any_round_resume_to_the_same_figures(tmp_path, method):
    flags = {**FLAGS, "extractor": {"rounds": 2, "local_epochs": 1, "loss": "adjusted"}}
    run = train(configure(flags=flags), tmp_path / "run")
    again = shutil.copytree(run.folder, tmp_path / "again")
    whole = baselines(run, methods=[method])

    def stop(_):
        raise Stop

    for _ in range(100):
        try:
            parts = baselines(read_run(again), stop, [method])
            break
        except Stop:
            continue
    assert parts == whole
    assert not (tmp_path / "again-baselines.partial").exists()


def test_an_unknown_baseline_is_refused_by_name(made):
    run, _ = made
    with pytest.raises(ConfigError, match="unknown baseline 'fedbabu'; expected one of local, fedavg"):
        baselines(run, methods=["local", "fedbabu"])
