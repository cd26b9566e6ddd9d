from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from train.trainings import SHORT

from nmoe_train.data.clients import assign_samples
from nmoe_train.data.datasets import load
from nmoe_train.pipeline import retrain_config, train
from nmoe_train.recipes import configure
from nmoe_train.results.evaluation import class_mixed, evaluate
from nmoe_train.results.rules import choose_rules
from nmoe_train.stages.privacy import noise_for


def test_the_default_training_is_as_accurate_as_documented(tmp_path):
    metrics = train(configure(flags={"seed": 0}), tmp_path / "run").metrics
    assert metrics["iid"]["networked"]["accuracy"] >= 0.93
    assert metrics["own"]["networked"]["accuracy"] >= 0.96
    assert metrics["own"]["kept_local"] >= 0.85


@pytest.mark.parametrize("chosen", [0.8, None])
def test_the_rules_are_chosen_on_held_out_samples_and_the_fleet_measured_on_test_sets(tmp_path, monkeypatch, chosen):
    clients = assign_samples(load("digits"), configure(flags=SHORT).data, 0)
    offered = []
    measured = []

    def choose(held, rules, *others):
        offered.append(held)
        found = choose_rules(held, rules, *others)
        return replace(found, inference=replace(found.inference, local_first=chosen, familiar=None))

    def watch(parts, rules, *others):
        measured.append([rows.y for rows in parts])
        assert rules.local_first == chosen
        return evaluate(parts, rules, *others)

    monkeypatch.setattr("nmoe_train.assessment.choose_rules", choose)
    monkeypatch.setattr("nmoe_train.assessment.evaluate", watch)
    run = train(configure(flags=SHORT), tmp_path / "run")
    (held,) = offered
    assert np.array_equal(held.y, torch.cat([y for _, y in clients.held_out]))
    for client, (_, y) in enumerate(clients.held_out):
        assert np.array_equal(held.y[held.clients == client], y)
    own, whole_test, _ = measured
    assert all(torch.equal(a, y) for a, (_, y) in zip(own, clients.own_test, strict=True))
    assert all(torch.equal(a, clients.test[1]) for a in whole_test)
    assert run.record.inference.local_first == chosen


@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_the_figures_of_a_run_can_be_recomputed_from_its_files(tmp_path, recipe):
    """Rebuild the networks from the run, route the rows and count right answers by hand."""
    config = configure(recipe, flags=SHORT)
    run = train(config, tmp_path / "run")
    rules, clients = run.record.inference, assign_samples(load("digits"), config.data, 0)
    assert rules.combination == ("probabilities" if recipe == "best" else "outputs")
    assert recipe == "best" or not rules.adapt
    assert run.record.answers_carry_prior == (recipe == "paper")
    extractor, experts = run.extractor(), [run.calibrated_expert(i) for i in range(3)]
    for part, tests in (("own", clients.own_test), ("iid", [clients.test] * 3)):
        right, kept = [], []
        for device, (x, y) in enumerate(tests):
            with torch.no_grad():
                h = extractor(x)
                asked = run.gate(device)(h).argmax(1)
                answers = torch.stack([expert(h) for expert in experts], 1).softmax(2)
            if rules.local_first is not None:
                local = answers[:, device].max(1).values > rules.local_first
                if rules.familiar is not None:
                    local &= torch.from_numpy(run.familiar(device).distances(h.numpy()) <= rules.familiar)
                asked[local] = device
            p = answers[torch.arange(len(y)), asked]
            if rules.adapt:
                p = class_mixed(p)
            right.append((p.argmax(1) == y).double().mean().item())
            kept.append((asked == device).double().mean().item())
        figures = run.metrics[part]
        assert figures["networked"]["devices"] == pytest.approx(right, abs=1e-6)
        assert figures["kept_local"] == pytest.approx(sum(kept) / 3, abs=1e-6)
    head = run.head(0)
    with torch.no_grad():
        p = head(extractor(clients.test[0])).softmax(1)
    if recipe == "paper":
        right = (p.argmax(1) == clients.test[1]).double().mean().item()
        assert run.metrics["iid"]["fedce"]["accuracy"] == pytest.approx(right, abs=1e-6)


def test_calibration_samples_are_the_held_out_samples_of_each_client(tmp_path):
    run = train(configure(flags=SHORT), tmp_path / "run")
    clients, calibration = assign_samples(load("digits"), configure(flags=SHORT).data, 0), run.calibration()
    for client, (x, y) in enumerate(clients.held_out):
        mine = calibration["clients"] == client
        assert np.array_equal(calibration["inputs"][mine], x.numpy())
        assert np.array_equal(calibration["labels"][mine], y.numpy())


def test_the_papers_fedgate_beats_rangate_by_ten_points(tmp_path):
    config = configure("paper")
    fedgate = train(config, tmp_path / "fedgate")
    again = retrain_config(fedgate, "gate", {"gate": {"method": "rangate"}})
    rangate = train(again, tmp_path / "rangate", again=(fedgate, "gate"))
    fedgate_accuracy = fedgate.metrics["iid"]["networked"]["accuracy"]
    rangate_accuracy = rangate.metrics["iid"]["networked"]["accuracy"]
    assert fedgate_accuracy >= rangate_accuracy + 0.10
    assert fedgate.metrics["iid"]["own_expert"] == rangate.metrics["iid"]["own_expert"]


def test_local_heads_are_kept_and_measured_for_each_client(tmp_path):
    run = train(configure(flags={**SHORT, "extractor": {"heads": "local", "rounds": 2}}), tmp_path / "run")
    heads = [run.head(i).state_dict() for i in range(3)]
    assert not torch.equal(heads[0]["0.weight"], heads[1]["0.weight"])
    assert len(set(run.metrics["iid"]["fedce"]["devices"])) > 1


def test_fedsc_needs_no_head_and_reports_the_privacy_cost_of_its_matrices(tmp_path):
    flags = {**SHORT, "extractor": {"method": "fedsc", "rounds": 3}, "fedsc": {"epsilon": 4.0, "views": "crop"}}
    seen = []
    run = train(configure(flags=flags), tmp_path / "run", progress=seen.append)
    assert run.head(0) is None
    assert "fedce" not in run.metrics["own"]
    costs = [finished.epsilon for finished in seen if finished.stage == "extractor"]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(4.0, rel=1e-6)
    samples = sum(run.metrics["split"]["train"][0])
    assert run.metrics["privacy"] == {
        "epsilon": costs[-1],
        "delta": 1e-5,
        "sigma": noise_for(4.0, math.sqrt(2) * 20.0 / samples, 3, 1e-5),
        "releases": 3,
    }
