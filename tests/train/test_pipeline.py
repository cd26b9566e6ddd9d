from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from train.trainings import SHORT, Stop, repeatable, stop_after, weights

from nmoe_train.checkpoint import CHECKPOINT_FILE, Checkpoint
from nmoe_train.errors import ConfigError, DivergedError, NetError, RunError
from nmoe_train.pipeline import retrain_config, stopped_config, train
from nmoe_train.recipes import configure
from nmoe_train.run import read_run


@pytest.mark.parametrize("method", ["rangate", "rollgate", "fedgate", "statgate"])
def test_a_training_writes_a_run_and_nothing_else(tmp_path, method):
    seen = []
    done = train(
        configure(flags={**SHORT, "gate": {"method": method, "rounds": 3, "laps": 1}}),
        tmp_path / "run",
        progress=lambda finished: seen.append((finished.stage, finished.round, finished.rounds)),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert seen[:3] == [("extractor", 1, 2), ("extractor", 2, 2), ("experts", 1, 2)]
    run = read_run(tmp_path / "run")
    assert run.metrics == done.metrics
    figures = {"own", "iid", "iid_rows", "calibration"}
    assert set(run.metrics) == figures | {"split", "bytes", "history", "seconds", "resources"}
    assert run.record.config["gate"]["method"] == method
    calibration = run.calibration()
    assert len(calibration["inputs"]) == len(calibration["labels"]) == len(calibration["clients"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(configure(flags={**SHORT, "seed": seed}), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize("after", range(1, 7))
def test_a_training_that_stops_after_any_round_resumes_to_the_same_numbers(tmp_path, after):
    config, left = configure(flags=SHORT), iter(range(after))

    def stop(*_):
        if next(left, None) is None:
            raise Stop

    train(config, tmp_path / "whole")
    try:
        train(config, tmp_path / "parts", progress=stop)
    except Stop:
        train(config, tmp_path / "parts", resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    parts = read_run(tmp_path / "parts").metrics
    whole = read_run(tmp_path / "whole").metrics
    assert repeatable(parts) == repeatable(whole)


def test_a_training_with_scaffold_that_stops_resumes_to_the_same_numbers(tmp_path):
    """Its control variates are in the checkpoint until stage 1 is over."""
    config = configure(flags={**SHORT, "extractor": {"rounds": 4, "share": 0.67, "correction": "scaffold"}})
    left = iter(range(2))

    def stop(*_):
        if next(left, None) is None:
            raise Stop

    train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", progress=stop)
    assert "variates" in Checkpoint.read(tmp_path / "parts.partial" / CHECKPOINT_FILE).states
    train(config, tmp_path / "parts", resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    plain = train(configure(flags={**SHORT, "extractor": {"rounds": 4, "share": 0.67}}), tmp_path / "plain")
    assert weights(tmp_path / "plain") != weights(tmp_path / "whole")
    sent = read_run(tmp_path / "whole").metrics["bytes"]["extractor"]["up"]
    assert 1.9 < sent / plain.metrics["bytes"]["extractor"]["up"] <= 2


def test_a_training_that_is_killed_resumes_to_the_same_numbers(tmp_path):
    """A real process gets a real SIGKILL at an arbitrary moment."""
    command = [sys.executable, "-c", "from nmoe_train.cli import main; main()", "run", "--rounds", "12", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    killed = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL)
    try:
        checkpoint = tmp_path / "killed.partial" / "checkpoint.safetensors"
        until = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed").exists()
    subprocess.run([*command, tmp_path / "killed", "--resume"], check=True, capture_output=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_resuming_with_another_configuration_is_refused_and_names_the_difference(tmp_path):
    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        train(configure(flags=SHORT), tmp_path / "run", progress=stop)
    assert stopped_config(tmp_path / "run") == configure(flags={**SHORT, "device": "cpu"})
    with pytest.raises(RunError, match=r"extractor\.rate was 0\.05 and is 0\.1"):
        train(configure(flags={**SHORT, "extractor": {"rounds": 2, "rate": 0.1}}), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="--resume"):
        train(configure(flags=SHORT), tmp_path / "run")
    checkpoint = tmp_path / "run.partial" / "checkpoint.safetensors"
    flipped = bytearray(checkpoint.read_bytes())
    flipped[-9] ^= 1
    for damaged in (bytes(flipped), checkpoint.read_bytes()[:-1], b"\0" * 100):
        checkpoint.write_bytes(damaged)
        with pytest.raises(RunError, match=r"cannot be resumed.*remove"):
            train(configure(flags=SHORT), tmp_path / "run", resume=True)


def test_resuming_with_other_data_under_the_same_name_is_refused(tmp_path):
    def write(seed):
        draw = np.random.default_rng(seed)
        arrays = {f"x_{part}": draw.integers(0, 255, (60, 8, 8), np.uint8) for part in ("train", "test")}
        np.savez(tmp_path / "mine.npz", **arrays, y_train=np.arange(60) % 3, y_test=np.arange(60) % 3)

    def stop(*_):
        raise Stop

    write(0)
    config = configure(flags={**SHORT, "data": {"clients": 3, "name": f"npz:{tmp_path}/mine.npz"}})
    with pytest.raises(Stop):
        train(config, tmp_path / "run", progress=stop)
    write(1)
    with pytest.raises(RunError, match="the data has changed"):
        train(config, tmp_path / "run", resume=True)
    write(0)
    assert train(config, tmp_path / "run", resume=True).record.data.fingerprint


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), tmp_path):
        with pytest.raises(RunError, match="the current folder would be replaced"):
            train(configure(flags=SHORT), out)


def test_other_files_in_the_checkpoints_folder_are_kept(tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis.txt").touch()
    train(configure(flags=SHORT), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run.partial").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_overwritten(tmp_path):
    train(configure(flags=SHORT), tmp_path / "run")
    for out in (tmp_path / "run", str(tmp_path / "run")):
        with pytest.raises(RunError, match="holds a finished run; choose another --out"):
            train(configure(flags=SHORT), out)
        with pytest.raises(RunError, match="holds a finished run; there is nothing to resume"):
            train(configure(flags=SHORT), out, resume=True)


def test_a_folder_with_other_files_is_refused_before_the_training(tmp_path):
    (tmp_path / "thesis.txt").touch()
    seen = []
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(RunError, match="choose another place"):
            train(configure(flags=SHORT), out, progress=seen.append)
    assert not seen


def test_a_backbone_in_the_current_folder_is_found_and_its_frozen_weights_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("frozen_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 64).requires_grad_(False)\n"
        "        nn.init.eye_(self.layer.weight)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x.float().flatten(1) / 255)\n"
    )
    flags = {**SHORT, "extractor": {"rounds": 2, "backbone": "frozen_net:Net"}}
    run = train(configure(flags=flags), tmp_path / "run")
    assert torch.equal(run.extractor().layer.weight, torch.eye(64))


def test_a_diverging_loss_stops_the_training_and_writes_no_run(tmp_path):
    config = configure(flags={**SHORT, "extractor": {"rounds": 3, "rate": 1e30, "clip": 1e30, "warm_rounds": 0}})
    with pytest.raises(DivergedError, match="extractor, round"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_backbone_with_another_latent_size_is_refused(tmp_path):
    flags = {**SHORT, "extractor": {"backbone": "torch.nn:Flatten", "rounds": 1}}
    with pytest.raises(NetError, match=r"returned \(2, 64\) for 2 images; it must return \(2, 32\)"):
        train(configure(flags={**flags, "extractor": {**flags["extractor"], "dim": 32}}), tmp_path / "run")


def test_a_stage_is_trained_again_and_earlier_stages_are_kept(tmp_path):
    first = train(configure(flags=SHORT), tmp_path / "first")
    same = train(retrain_config(first, "experts", {}), tmp_path / "same", again=(first, "experts"))
    assert weights(tmp_path / "same") == weights(tmp_path / "first")
    assert repeatable(same.metrics) == repeatable(first.metrics)
    config = retrain_config(first, "experts", {"experts": {"epochs": 5}})
    other = train(config, tmp_path / "other", again=(first, "experts"))
    before, after = weights(tmp_path / "first"), weights(tmp_path / "other")
    assert before["extractor.safetensors"] == after["extractor.safetensors"]
    assert before["experts/01.safetensors"] != after["experts/01.safetensors"]
    assert [entry["stage"] for entry in other.metrics["history"]].count("extractor") == 2
    config = retrain_config(first, "evaluate", {"inference": {"local_first": False, "top_k": 2}})
    measured = train(config, tmp_path / "measured", again=(first, "evaluate"))
    assert weights(tmp_path / "measured") == before
    assert measured.record.inference.top_k == 2
    assert measured.record.inference.local_first is None


def test_a_stage_that_is_stopped_resumes_to_the_same_numbers(tmp_path):
    first = train(configure(flags=SHORT), tmp_path / "first")
    config = retrain_config(first, "gate", {"gate": {"rounds": 4}})
    train(config, tmp_path / "whole", again=(first, "gate"))
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", again=(first, "gate"), progress=stop_after(2))
    train(config, tmp_path / "parts", again=(first, "gate"), resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_settings_of_stages_that_are_kept_cannot_be_changed(tmp_path):
    run = train(configure(flags=SHORT), tmp_path / "run")
    for flags, text in (
        (
            {"extractor": {"rate": 0.1}},
            r"extractor\.rate was 0\.05 and is 0\.1, but `nmoe-train gate` cannot change it",
        ),
        ({"data": {"partition": "iid"}}, r"data\.partition"),
        ({"experts": {"epochs": 9}}, r"experts\.epochs"),
    ):
        with pytest.raises(ConfigError, match=text):
            retrain_config(run, "gate", flags)
    assert retrain_config(run, "gate", {"inference": {"top_k": 2}}).inference.top_k == 2
    with pytest.raises(ConfigError, match="unknown stage 'head'"):
        retrain_config(run, "head", {})
    with pytest.raises(ConfigError, match="unknown stage 'head'"):
        train(configure(flags=SHORT), tmp_path / "other", again=(run, "head"))


@pytest.mark.parametrize(
    "changes",
    [
        {"extractor": {"heads": "local", "rounds": 2}},
        {"extractor": {"head": "linear", "rounds": 2}, "experts": {"start": "fresh", "epochs": 2}},
        {"gate": {"method": "rollgate", "laps": 1, "order": "shuffled"}},
        {"gate": {"method": "fedgate", "widths": [8], "rounds": 2}},
        {"gate": {"method": "fedgate", "own": "weights", "rounds": 2}},
        {"gate": {"method": "fedgate", "train_top_k": 2, "loss": "expected", "rounds": 2}},
        {"gate": {"method": "statgate", "statistics": "moments"}},
        {"data": {"clients": 1}},
        {"gate": {"method": "statgate", "statistics": "means", "epsilon": 8.0}},
        {"gate": {"method": "fedgate", "own": "nothing", "rounds": 2}},
        {"gate": {"method": "rangate", "shares": [0.5, 0.3, 0.2]}},
        {
            "extractor": {"drop": 0.5, "rounds": 3, "share": 0.7, "step_limit": 3},
            "gate": {"method": "fedgate", "drop": 0.5, "rounds": 3},
        },
        {"data": {"clients": 1}, "gate": {"method": "fedgate", "rounds": 2}},
        {"extractor": {"method": "fedsc", "rounds": 2, "batch": 64}, "fedsc": {"views": "crop", "epsilon": 8.0}},
    ],
    ids=str,
)
def test_every_kind_of_training_can_be_resumed_and_evaluated_again(tmp_path, changes):
    flags = {section: {**SHORT.get(section, {}), **changes.get(section, {})} for section in {**SHORT, **changes}}
    config = configure(flags=flags)
    train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", progress=stop_after(2))
    train(config, tmp_path / "parts", resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    run = read_run(tmp_path / "whole")
    measured = train(retrain_config(run, "evaluate", {}), tmp_path / "measured", again=(run, "evaluate"))
    assert repeatable(measured.metrics) == repeatable(run.metrics)


def test_a_spent_budget_ends_the_stage_and_one_too_small_for_a_release_is_refused(tmp_path):
    def flags(sigma):
        return {**SHORT, "extractor": {"method": "fedsc", "rounds": 9}, "fedsc": {"epsilon": 8.0, "sigma": sigma}}

    run = train(configure(flags=flags(0.35)), tmp_path / "run")
    rounds = [entry for entry in run.metrics["history"] if entry["stage"] == "extractor"]
    assert 0 < len(rounds) < 9
    assert rounds[-1]["epsilon"] <= 8.0
    with pytest.raises(ConfigError, match="single release"):
        train(configure(flags=flags(0.001)), tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


def test_bytes_are_counted_by_stage(tmp_path):
    run = train(configure(flags=SHORT), tmp_path / "run")
    classifier = sum(p.numel() * 4 for net in (run.extractor(), run.head(0)) for p in net.state_dict().values())
    expert = sum(p.numel() * 4 for p in run.expert(0).state_dict().values())
    assert run.metrics["bytes"]["extractor"] == {"up": 2 * 3 * classifier, "down": 2 * 3 * classifier}
    assert run.metrics["bytes"]["experts"] == {"up": 3 * expert, "down": 6 * expert}
    gate = 4 * (64 * 3 + 3)
    assert run.metrics["bytes"]["gate"] == {"up": 3 * 2 * gate, "down": 3 * 2 * gate}


def test_two_trainings_into_one_folder_are_refused(tmp_path):
    """The first training runs in another process."""
    command = [sys.executable, "-c", "from nmoe_train.cli import main; main()", "run", "--rounds", "500", "--out"]
    first = subprocess.Popen([*command, tmp_path / "run"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run.partial" / "checkpoint.safetensors").exists() and time.monotonic() < until:
            time.sleep(0.01)
        for resume in (False, True):
            with pytest.raises(RunError, match="another process is training there"):
                train(configure(flags=SHORT), tmp_path / "run", resume=resume)
    finally:
        first.kill()
        first.wait()
    with pytest.raises(RunError, match="finish it with --resume"):
        train(configure(flags=SHORT), tmp_path / "run")


def test_resuming_a_written_run_only_removes_its_checkpoint(tmp_path):
    with pytest.raises(Stop):
        train(configure(flags=SHORT), tmp_path / "run", progress=stop_after(4))
    left = (tmp_path / "run.partial" / "checkpoint.safetensors").read_bytes()
    train(configure(flags=SHORT), tmp_path / "run", resume=True)
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "checkpoint.safetensors").write_bytes(left)
    assert train(configure(flags=SHORT), tmp_path / "run", resume=True).record.experts == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failure_before_the_first_round_leaves_no_files(tmp_path):
    with pytest.raises(NetError):
        train(configure(flags={"extractor": {"backbone": "nowhere:Net"}}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_impossible_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (Path("/"), tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match="choose another"):
            train(configure(flags=SHORT), out)
    (tmp_path / "run.partial").touch()
    with pytest.raises(RunError, match="choose another"):
        train(configure(flags=SHORT), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="finds no CUDA device here; use --device cpu"):
        train(configure(flags={**SHORT, "device": "cuda"}), tmp_path / "run")


def test_a_training_restores_the_random_state_and_threads_of_its_process(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(configure(flags={**SHORT, "threads": 2}), tmp_path / "run")
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == 1
