from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nmoe_train.cli import main
from nmoe_train.results.pages.formats import BASELINES
from nmoe_train.run import read_run

QUICK = ("--rounds", "2", "--clients", "3", "--set", "gate.rounds=3", "--set", "experts.epochs=2")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def nmoe_train(run_main):
    return lambda *arguments: run_main(main, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quick run that no test changes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-c", "from nmoe_train.cli import main; main()", "run", *QUICK, "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "command",
    ["run", "extractor", "experts", "gate", "evaluate", "baselines", "settings", "inspect", "table", "figure"],
)
def test_help_shows_an_example(nmoe_train, command):
    shown = nmoe_train(command, "--help")
    assert shown.exit_code == 0
    assert f"nmoe-train {command}" in shown.output.partition("Example")[2]


def test_inspect_describes_a_run(nmoe_train, golden):
    shown = nmoe_train("inspect", golden / "run")
    assert shown.exit_code == 0
    assert "bands, 12 samples" in shown.output
    assert "verified" in shown.output


def test_inspect_prints_json(nmoe_train, golden):
    shown = json.loads(nmoe_train("inspect", "--json", golden / "run").output)
    assert shown["run"]["experts"] == 3
    assert shown["metrics"] == {"note": "untrained"}


def test_a_damaged_run_gives_a_one_line_error(nmoe_train, golden, tmp_path):
    folder = shutil.copytree(golden / "run", tmp_path / "run")
    (folder / "gates" / "02.safetensors").unlink()
    shown = nmoe_train("inspect", folder)
    assert shown.exit_code == 1
    assert shown.error == f"nmoe-train: {folder / 'gates/02.safetensors'}: No such file or directory\n"


def test_without_torch_the_error_shows_the_pip_command(nmoe_train, golden, monkeypatch):
    monkeypatch.delitem(sys.modules, "nmoe_train.run", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    shown = nmoe_train("inspect", golden / "run")
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == "nmoe-train: torch is not installed; pip install 'nmoe[train]'\n"


def test_run_trains_into_a_free_folder_and_prints_the_result(nmoe_train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = nmoe_train("run", "--rounds", "2", "--clients", "3", "--gate", "rangate")
    assert shown.exit_code == 0, shown.error
    assert "asked another device" in shown.output
    assert (tmp_path / "runs" / "digits-1" / "report.html").exists()
    assert "next: nmoe-export runs/digits-1" in shown.output
    assert "extractor    2/2" in shown.error
    again = nmoe_train("run", "--rounds", "1", "--clients", "3", "--gate", "rangate")
    assert "runs/digits-2:" in again.output


def test_ctrl_c_prints_the_command_that_resumes(nmoe_train, tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe_train.cli.Progress", lambda: interrupt)
    shown = nmoe_train("run", "--rounds", "2", "--clients", "3", "--out", tmp_path / "run")
    assert shown.exit_code == 1
    assert shown.error.endswith(f"nmoe-train: stopped; finish it with: nmoe-train run --out {tmp_path}/run --resume\n")
    monkeypatch.undo()


def test_a_resumed_training_keeps_its_own_settings(nmoe_train, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("nmoe_train.trainer.Trainer._train_gate", interrupt)
        nmoe_train("run", "--rounds", "2", "--clients", "3", "--seed", "9", "--out", tmp_path / "run")
    shown = nmoe_train("run", "--out", tmp_path / "run", "--resume")
    assert shown.exit_code == 0, shown.error
    assert read_run(tmp_path / "run").record.seed == 9
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["extractor"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--partition", "bogus"), "unknown partition 'bogus'"),
        (("--data", "nowhere"), "unknown data set 'nowhere'"),
        (("--data", "npz:nowhere.npz"), "nowhere.npz: cannot be read"),
        (("--clients", "0"), "clients is 0"),
        (("--clients", "1000"), "Lower data.clients"),
        (("--backbone", "nowhere:net"), "nowhere:net cannot be imported"),
        (("--resume",), "--resume needs --out"),
        (("--resume", "--out", "nowhere"), "there is no stopped training to resume"),
        (("--dp-epsilon", "8"), "set extractor.method = 'fedsc'"),
        (("--set", "gate=1"), "gate is a section"),
        (("--set", "rate=1"), "did you mean extractor.rate or experts.rate or gate.rate?"),
        (("--partition", "noniid"), "did you mean noniid:0.5?"),
        (("--resume", "--out", "x" * 300), "there is no stopped training to resume"),
        (("--out", "x" * 300), "choose another --out"),
        (("--out", "runs/a.partial"), "name the run without .partial"),
        (("--config", "nowhere.toml"), "nowhere.toml: No such file"),
    ],
)
def test_bad_input_gives_a_one_line_error(nmoe_train, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    shown = nmoe_train("run", *arguments)
    assert (shown.exit_code, shown.output) == (1, "")
    assert text in shown.error
    assert shown.error.count("\n") == 1
    assert not list(tmp_path.rglob("run.json"))


def test_ctrl_c_before_the_first_checkpoint_suggests_no_resume(nmoe_train, tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe_train.pipeline.load", interrupt)
    shown = nmoe_train("run", "--out", tmp_path / "run")
    assert shown.exit_code == 1
    assert "--resume" not in shown.error
    assert not list(tmp_path.iterdir())


def test_a_real_ctrl_c_keeps_the_checkpoint_and_prints_the_command_that_resumes(tmp_path):
    command = [sys.executable, "-c", "from nmoe_train.cli import main; main()", "run", "--rounds", "500"]
    running = subprocess.Popen([*command, "--out", "run"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run.partial" / "checkpoint.safetensors").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(running.pid, signal.SIGINT)
        error = running.communicate(timeout=60)[1]
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 1
    assert error.endswith("nmoe-train: stopped; finish it with: nmoe-train run --out run --resume\n")


def test_json_prints_every_round_and_the_result(nmoe_train, tmp_path):
    shown = nmoe_train("run", *QUICK, "--gate", "fedgate", "--json", "--out", tmp_path / "run")
    lines = [json.loads(line) for line in shown.output.splitlines()]
    assert [(line["stage"], line["round"]) for line in lines[:-1]] == [
        *(("extractor", n) for n in (1, 2)),
        *(("experts", n) for n in (1, 2)),
        *(("gate", n) for n in (1, 2, 3)),
    ]
    assert lines[0]["loss"] > 0
    assert lines[-1]["metrics"]["own"]["networked"]["accuracy"] > 0
    assert shown.error == ""


def test_a_stage_command_writes_a_new_run_next_to_the_old_one(nmoe_train, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "mine")
    shown = nmoe_train("gate", folder, "--gate", "rollgate", "--set", "gate.laps=1")
    assert shown.exit_code == 0, shown.error
    made = read_run(tmp_path / "mine-gate-1").record
    assert made.config["gate"]["method"] == "rollgate"
    assert made.config["extractor"]["rounds"] == 2
    shown = nmoe_train("evaluate", folder, "--top-k", "2", "--out", tmp_path / "two")
    assert read_run(tmp_path / "two").record.inference.top_k == 2
    shown = nmoe_train("experts", folder, "--set", "extractor.rate=1.0")
    assert (shown.exit_code, shown.error.count("\n")) == (1, 1)
    assert "extractor.rate was 0.05 and is 1.0, but `nmoe-train experts` cannot change it" in shown.error


def test_printed_settings_are_a_file_for_config(nmoe_train, tmp_path):
    shown = nmoe_train("settings", "--recipe", "paper", "--set", "gate.rate=0.25")
    assert "[gate]" in shown.output
    assert "rate = 0.25" in shown.output
    (tmp_path / "all.toml").write_text(shown.output)
    assert nmoe_train("settings", "--config", tmp_path / "all.toml").output == shown.output


def test_baselines_are_measured_once_and_shown_with_the_run(nmoe_train, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    first = nmoe_train("baselines", folder, "--only", "local")
    assert set(json.loads((folder / "baselines.json").read_text())) == {"local"}
    assert "Local classifier" in first.output
    shown = nmoe_train("baselines", folder)
    assert shown.exit_code == 0, shown.error
    for name in ("Networked", "Local classifier", "FedAvg classifier", "FedRep", "Ditto", "Centralised mixture"):
        assert name in shown.output
    assert "local" not in shown.error
    found = json.loads((folder / "baselines.json").read_text())
    assert set(found) == set(BASELINES)
    written = (folder / "baselines.json").read_bytes()
    again = nmoe_train("baselines", folder)
    assert "extractor" not in again.error
    assert (folder / "baselines.json").read_bytes() == written
    assert "fedavg2" in nmoe_train("baselines", folder, "--only", "fedavg2").error
    (folder / "baselines.json").write_text("[")
    assert "remove it to measure again" in nmoe_train("baselines", folder).error


def test_a_full_disk_gives_a_one_line_error_and_keeps_the_previous_round(tmp_path):
    """A limit of 200 kB per file stands in for a full disk; the checkpoint exceeds it with a gate for each client."""

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [sys.executable, "-c", "from nmoe_train.cli import main; main()", "run", *QUICK, "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=full, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("File too large; the checkpoint of the previous round is kept")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert resumed.returncode == 0, resumed.stderr
