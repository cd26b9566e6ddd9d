from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from nmoe_train.checkpoint import claim_folder
from nmoe_train.data.datasets import load
from nmoe_train.errors import ConfigError, DataError, RunError
from nmoe_train.results.baselines import baselines
from nmoe_train.results.paper import work as module
from nmoe_train.results.paper.folder import Plan, read
from nmoe_train.results.paper.units import Unit, split_units
from nmoe_train.results.paper.work import split_sizes, work
from nmoe_train.run import read_run


def test_calls_without_time_for_a_whole_unit_still_make_progress(made):
    assert made.calls > 12
    assert set(made.done) == {unit.name for unit in made.wanted}
    assert read(made.plan, load("digits")) == made.done


def test_a_unit_holds_the_figures_of_its_run(made):
    name = "noniid-0.5-fedce-rollgate-0"
    run = read_run(made.plan.out / name)
    assert made.done[name]["own"]["accuracy"] == pytest.approx(run.metrics["own"]["networked"]["accuracy"], abs=1e-5)
    assert made.done[name]["iid"]["auc"] == pytest.approx(run.metrics["iid_rows"]["networked"]["auc"], abs=1e-5)
    base = read_run(made.plan.out / "noniid-0.5-fedce-fedgate-0")
    assert run.record.files["extractor.safetensors"] == base.record.files["extractor.safetensors"]
    found = json.loads((base.folder / "baselines.json").read_text())
    kept = made.done["noniid-0.5-fedce-baselines-0"]
    assert kept["local"]["iid"]["accuracy"] == pytest.approx(found["local"]["iid_rows"]["accuracy"], abs=1e-5)
    assert len(kept["centralised"]["own"]["routing"]) == 3


def test_more_experts_per_row_are_measured_without_training_and_without_leaving_a_run(made):
    base = made.done["noniid-0.5-fedsc-fedgate-0"]
    assert made.done["noniid-0.5-fedsc-top-1-0"] == base
    dense = made.done["noniid-0.5-fedsc-top-3-0"]["own"]
    assert np.allclose(dense["routing"], 1 / 3, atol=1e-3)
    assert not [path for path in made.plan.out.iterdir() if "top" in path.name]


def test_paper_json_is_small_enough_to_commit(made):
    per_unit = made.plan.path.stat().st_size / len(made.done)
    assert per_unit < 1000
    assert "history" not in made.plan.path.read_text()


def test_finished_units_are_not_repeated_and_need_no_lock(made):
    with claim_folder(made.plan.out):
        assert work(made.plan, made.wanted, pytest.fail) == made.done


def test_a_second_process_is_refused_while_one_works(tmp_path, quick):
    plan = Plan(tmp_path / "out", "paper", quick)
    with claim_folder(plan.out), pytest.raises(RunError, match="another process is training there"):
        work(plan, [Unit("iid", "fedce", "fedgate", 0)])
    assert not plan.out.exists()


def test_other_settings_are_refused_and_named(made, quick):
    other = Plan(made.plan.out, "paper", {**quick, "extractor": {"rounds": 3, "local_epochs": 1}})
    with pytest.raises(RunError, match=r"fedce\.extractor\.rounds was 2 and is 3"):
        work(other, [])
    with pytest.raises(RunError, match="made with other settings"):
        work(Plan(made.plan.out, "best", quick), [])


def test_settings_that_are_newer_than_the_file_count_as_their_defaults(made, tmp_path, quick):
    text = made.plan.path.read_text().replace('"own_weight": "falling", ', "")
    plan = Plan(tmp_path, "paper", quick)
    plan.path.write_text(text)
    assert work(plan, []) == made.done


def test_other_data_are_refused(made, monkeypatch):
    digits = load("digits")
    changed = replace(digits, x_test=255 - digits.x_test)
    monkeypatch.setattr(module, "load", lambda _name: changed)
    with pytest.raises(RunError, match=r"made with other data named digits \(fingerprint \w{12}, and now \w{12}\)"):
        work(made.plan, [])


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"units": {}}', '{"units": {}, "schema": 1}'])
def test_a_file_that_is_no_paper_json_is_refused_in_one_line(tmp_path, quick, text):
    plan = Plan(tmp_path, "paper", quick)
    plan.path.write_text(text)
    with pytest.raises(RunError, match=r"paper.json: .*; choose another --out"):
        work(plan, [])


def test_a_run_that_does_not_belong_to_the_table_is_refused(made, quick):
    wanted = Unit("noniid:0.5", "fedce", "fedgate", 0)
    other = Plan(made.plan.out, "paper", {**quick, "extractor": {"rounds": 7, "local_epochs": 1}})
    with pytest.raises(
        RunError, match=r"noniid-0.5-fedce-fedgate-0: is a run with other settings .*rounds was 2 and is 7"
    ):
        module._figures(other, wanted, lambda _: None)


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        ("noiid:0.5", "unknown partition 'noiid:0.5'; did you mean noniid:0.5?"),
        ("classes:0", "must be a whole number in 1..10"),
        ("noniid:2", "τ must be in 0..1"),
    ],
)
def test_an_impossible_split_is_refused_before_anything_is_trained(tmp_path, quick, partition, text):
    plan = Plan(tmp_path / "out", "paper", quick)
    wanted = [Unit("iid", "fedce", "fedgate", 0), Unit(partition, "fedce", "fedgate", 0)]
    with pytest.raises(DataError, match=re.escape(text)):
        work(plan, wanted, pytest.fail)
    assert not plan.out.exists()


@pytest.mark.parametrize("flags", [{"seed": 1}, {"data": {"partition": "iid"}}, {"gate": {"method": "rangate"}}])
def test_settings_that_vary_over_the_table_are_refused(tmp_path, flags):
    with pytest.raises(ConfigError, match="varies over the table; leave it out"):
        Plan(tmp_path, "paper", flags)


def test_one_data_set_is_split_among_any_number_of_clients(tmp_path):
    plan = Plan(tmp_path, "paper", {})
    sizes = split_sizes(plan, ["noniid:0.5", "noniid:0.2"], [5, 10, 40])
    totals = {clients * samples for (_, clients), samples in sizes.items()}
    assert max(totals) - min(totals) < 40
    # Five clients at τ = 0.2 need 5/6 · n + 4 · n/54 of the 120 samples of a class: n is at most 132.
    assert 640 <= min(totals) <= max(totals) <= 660
    assert len({unit.name for unit in split_units(sizes, 2)}) == 24
    assert Unit("noniid:0.5", "fedce", "fedgate", 0, 5, 132).name == "noniid-0.5-fedce-fedgate-0-5x132"


def test_the_runs_of_the_tables_are_used_where_the_size_is_the_same(tmp_path):
    sizes = split_sizes(Plan(tmp_path, "paper", {}), ["iid"], [10, 20])
    assert sizes == {("iid", 10): None, ("iid", 20): 60}
    assert Unit("iid", "fedsc", "fedgate", 0) in split_units(sizes, 1)


def test_baselines_that_are_stopped_resume_to_the_same_figures(made, tmp_path):
    folder = shutil.copytree(made.plan.out / "noniid-0.5-fedce-fedgate-0", tmp_path / "run")
    before = json.loads((folder / "baselines.json").read_text())
    (folder / "baselines.json").unlink()

    def stop(finished):
        if finished.stage == "centralised":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baselines(read_run(folder), stop)
    assert set(json.loads((folder / "baselines.json").read_text())) == set(before) - {"centralised"}
    assert baselines(read_run(folder)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "Centralised mixture" in (folder / "report.html").read_text(encoding="utf-8")


def test_balanced_rows_of_each_device_give_about_the_figures_of_the_whole_test_set(made):
    metrics = read_run(made.plan.out / "noniid-0.5-fedce-fedgate-0").metrics
    whole = metrics["iid"]["networked"]
    sampled = metrics["iid_rows"]["networked"]
    assert sampled["auc"] == pytest.approx(whole["auc"], abs=0.05)
    assert sampled["accuracy"] == pytest.approx(whole["accuracy"], abs=0.08)
