from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nmoe_train.checkpoint import Checkpoint, difference
from nmoe_train.cli import main
from nmoe_train.config import Config, configure
from nmoe_train.errors import ConfigError, DivergedError, NetError, RunError
from nmoe_train.pipeline import stopped_config, train
from nmoe_train.run import read_run

SHORT = {"extractor": {"rounds": 2}, "gate": {"rounds": 3, "laps": 1}, "experts": {"epochs": 2}, "data": {"clients": 3}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder):
    """Digest of every file of a run that a training's numbers are in."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".safetensors", ".npz"}
    }


@pytest.mark.parametrize("method", ["rangate", "rollgate", "fedgate"])
def test_a_training_leaves_a_run_and_nothing_else(tmp_path, method):
    seen = []
    done = train(
        configure(flags={**SHORT, "gate": {"method": method, "rounds": 3, "laps": 1}}),
        tmp_path / "run",
        progress=lambda *round_: seen.append(round_[:3]),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert seen[:3] == [("extractor", 1, 2), ("extractor", 2, 2), ("experts", 1, 1)]
    run = read_run(tmp_path / "run")
    assert run.metrics == done.metrics
    assert set(run.metrics) == {"own", "iid", "history", "seconds"}
    assert run.record.config["gate"]["method"] == method
    calibration = run.calibration()
    assert len(calibration["inputs"]) == len(calibration["labels"]) == len(calibration["clients"])


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(configure(flags={**SHORT, "seed": seed}), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", range(1, 7))
def test_a_training_that_stops_after_any_round_goes_on_to_the_same_numbers(tmp_path, after):
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
    parts, whole = (read_run(tmp_path / name).metrics for name in ("parts", "whole"))
    assert {**parts, "seconds": None} == {**whole, "seconds": None}


def test_a_training_that_is_killed_goes_on_to_the_same_numbers(tmp_path):
    """A real process and a real SIGKILL, in the middle of whatever it is doing."""
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


def test_another_configuration_refuses_to_resume_and_names_the_difference(tmp_path):
    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        train(configure(flags=SHORT), tmp_path / "run", progress=stop)
    assert stopped_config(tmp_path / "run") == configure(flags=SHORT)
    with pytest.raises(RunError, match=r"extractor\.rate was 0\.05 and is 0\.1"):
        train(configure(flags={**SHORT, "extractor": {"rounds": 2, "rate": 0.1}}), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="--resume"):
        train(configure(flags=SHORT), tmp_path / "run")
    checkpoint = tmp_path / "run.partial" / "checkpoint.safetensors"
    flipped = bytearray(checkpoint.read_bytes())
    flipped[-9] ^= 1
    for damaged in (bytes(flipped), checkpoint.read_bytes()[:-1], b"\0" * 100):
        checkpoint.write_bytes(damaged)
        with pytest.raises(RunError, match=r"no checkpoint to go on from.*remove"):
            train(configure(flags=SHORT), tmp_path / "run", resume=True)


def test_other_data_under_the_same_name_refuses_to_resume(tmp_path):
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
    with pytest.raises(RunError, match="cannot go on with other data"):
        train(config, tmp_path / "run", resume=True)
    write(0)
    assert train(config, tmp_path / "run", resume=True).record.data.fingerprint


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (Path(), tmp_path):
        with pytest.raises(RunError, match="the current folder would be replaced"):
            train(configure(flags=SHORT), place)


def test_what_somebody_laid_beside_the_checkpoint_stays(tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis.txt").touch()
    train(configure(flags=SHORT), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run.partial").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_trained_over(tmp_path):
    train(configure(flags=SHORT), tmp_path / "run")
    with pytest.raises(RunError, match="holds a finished run"):
        train(configure(flags=SHORT), tmp_path / "run")


def test_a_place_that_is_taken_is_refused_before_the_training(tmp_path):
    (tmp_path / "thesis.txt").touch()
    seen = []
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(RunError, match="choose another place"):
            train(configure(flags=SHORT), place, progress=lambda *round_: seen.append(round_))
    assert not seen


def test_a_module_in_the_current_folder_is_found_and_what_it_froze_stays(tmp_path, monkeypatch):
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


def test_a_loss_that_explodes_keeps_the_last_good_state(tmp_path):
    config = configure(flags={**SHORT, "extractor": {"rounds": 3, "rate": 1e30, "clip": 1e30, "warm_rounds": 0}})
    with pytest.raises(DivergedError, match="extractor, round"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_another_width_is_refused(tmp_path):
    flags = {**SHORT, "extractor": {"backbone": "torch.nn:Flatten", "rounds": 1}}
    with pytest.raises(NetError, match=r"makes latents of \(64,\), not 32|makes latents"):
        train(configure(flags={**flags, "extractor": {**flags["extractor"], "dim": 32}}), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"sed": 1}, "unknown key 'sed' .did you mean 'seed'"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"extractor": {"rounds": 0}}, "extractor: rounds is 0"),
        ({"extractor": {"rate": -1.0}}, "extractor: rate is -1.0"),
        ({"extractor": {"batch": 0}}, "extractor: batch is 0"),
        ({"extractor": {"dim": 0}}, "extractor: dim is 0"),
        ({"extractor": {"share": 7.0}}, "extractor: share is 7.0"),
        ({"experts": {"widths": [0]}}, "experts: widths"),
        ({"experts": {"epochs": 0}}, "experts: epochs is 0"),
        ({"gate": {"rounds": -5}}, "gate: rounds is -5"),
        ({"gate": {"share": 0.0}}, "gate: share is 0.0"),
        ({"gate": {"lap": 1}}, "unknown key 'gate.lap'"),
        ({"data": {"clients": 0}}, "clients is 0"),
        ({"data": {"held_out": 1.0}}, "held_out is 1.0"),
        ({"inference": {"top_k": 11}}, "top_k is 11 of 10"),
        ({"experts": {"loss": "plain"}}, "adapt needs"),
        ({"extractor": {"heads": "local"}}, "needs extractor.heads"),
        ({"gate": {"method": "softgate"}}, "none of 'rangate', 'rollgate', 'fedgate'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(flags, text):
    with pytest.raises(ConfigError, match=text):
        configure(flags=flags)


def test_flags_override_the_file_which_overrides_the_recipe(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 4\n[gate]\nrounds = 7\nload_loss = 0.5\n")
    config = configure("paper", file, {"gate": {"rounds": 9}})
    assert (config.seed, config.gate.rounds, config.gate.load_loss, config.gate.loss) == (4, 9, 0.5, "outputs")
    assert configure("best") == Config()
    with pytest.raises(ConfigError, match="no recipe is called 'worst'"):
        configure("worst")
    file.write_text("seed = ")
    with pytest.raises(ConfigError, match="mine.toml"):
        configure(file=file)
    with pytest.raises(ConfigError, match="No such file"):
        configure(file=tmp_path / "nowhere.toml")


def test_a_checkpoint_comes_back_whole_and_keeps_shared_weights_once(tmp_path):
    shared = {"w": torch.randn(3)}
    states = {"extractor": [shared] * 3, "gate": [{"b": torch.ones(2) * i} for i in range(3)]}
    written = Checkpoint({"seed": 1}, "gate", 4, states, [{"loss": 0.1}])
    written.write(tmp_path / "c.safetensors")
    back = Checkpoint.read(tmp_path / "c.safetensors")
    assert (back.config, back.stage, back.round, back.history) == ({"seed": 1}, "gate", 4, [{"loss": 0.1}])
    assert back.states["extractor"][0] is back.states["extractor"][2]
    assert [state["b"][0].item() for state in back.states["gate"]] == [0, 1, 2]


def test_the_first_difference_is_named_with_its_place():
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 1}) == "a.b was 1 and is 2"
    assert difference({}, {"c": 1}) == "c was None and is 1"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_is_as_good_as_it_is_said_to_be(tmp_path, seed):
    metrics = train(configure(flags={"seed": seed}), tmp_path / "run").metrics
    assert metrics["iid"]["networked"]["accuracy"] >= 0.93
    assert metrics["own"]["networked"]["accuracy"] >= 0.96
    assert metrics["own"]["kept_local"] >= 0.85


def test_run_without_an_option_trains_the_default_and_says_what_came_out(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run_main(main, "run", "--rounds", "2", "--clients", "3", "--gate", "rangate")
    assert shown.exit_code == 0, shown.error
    assert "asked another device" in shown.output
    assert "runs/digits-1: 3 devices; next: nmoe-export runs/digits-1" in shown.output
    assert "extractor    2/2" in shown.error
    again = run_main(main, "run", "--rounds", "1", "--clients", "3", "--gate", "rangate")
    assert "runs/digits-2:" in again.output


def test_ctrl_c_says_how_to_go_on(run_main, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nmoe_train.cli.Progress", lambda: interrupt)
    shown = run_main(main, "run", "--rounds", "2", "--clients", "3", "--out", tmp_path / "run")
    assert shown.exit_code == 1
    assert shown.error.endswith(f"nmoe-train: stopped; go on with: nmoe-train run --out {tmp_path}/run --resume\n")
    monkeypatch.undo()


def test_a_resumed_training_keeps_its_own_settings(run_main, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("nmoe_train.pipeline._Fleet.train_gate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_main(main, "run", "--rounds", "2", "--clients", "3", "--seed", "9", "--out", tmp_path / "run")
    shown = run_main(main, "run", "--out", tmp_path / "run", "--resume")
    assert shown.exit_code == 0, shown.error
    assert read_run(tmp_path / "run").record.seed == 9
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["extractor"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--partition", "bogus"), "no split is called 'bogus'"),
        (("--data", "nowhere"), "no data set is called 'nowhere'"),
        (("--data", "npz:nowhere.npz"), "nowhere.npz: cannot be read"),
        (("--clients", "0"), "clients is 0"),
        (("--clients", "1000"), "without a sample"),
        (("--backbone", "nowhere:net"), "nowhere:net cannot be imported"),
        (("--resume",), "--resume needs --out"),
        (("--resume", "--out", "nowhere"), "no checkpoint to go on from"),
        (("--config", "nowhere.toml"), "nowhere.toml: No such file"),
    ],
)
def test_bad_input_is_one_line(run_main, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    shown = run_main(main, "run", *arguments)
    assert (shown.exit_code, shown.output) == (1, "")
    assert text in shown.error
    assert shown.error.count("\n") == 1
    assert not list(tmp_path.rglob("run.json"))
