from __future__ import annotations

import json

import pytest

from nmoe_train.cli import main
from nmoe_train.errors import RunError
from nmoe_train.results import paper
from nmoe_train.results.baselines import METHODS, baselines
from nmoe_train.results.paper import FIGURE_PARTITION, draw, figures_of, table, units, work
from nmoe_train.run import read_run

QUICK = {
    "data": {"clients": 3},
    "extractor": {"rounds": 2, "local_epochs": 1},
    "experts": {"epochs": 1},
    "gate": {"rounds": 2, "laps": 1},
    "fedsc": {"matrix_views": 1},
}


def quiet(_finished):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All units of one split, made by calls that have time for one round each."""
    out = tmp_path_factory.mktemp("paper") / "digits"
    wanted = units([FIGURE_PARTITION], 1)
    calls = 0
    while len(done := work(out, "paper", QUICK, wanted, quiet, 0.0)) < len(wanted):
        calls += 1
        assert calls < 40, "a call makes no progress"
    return out, done, calls


def test_calls_without_time_for_a_whole_unit_still_make_progress(made):
    out, done, calls = made
    assert calls > 12
    assert set(done) == {unit.name for unit in units([FIGURE_PARTITION], 1)}
    assert json.loads((out / "paper.json").read_text())["units"] == done


def test_a_unit_holds_the_figures_of_its_run(made):
    out, done, _ = made
    name = "noniid-0.5-fedce-rollgate-0"
    assert done[name]["iid"] == read_run(out / name).metrics["iid"]["networked"]
    base = read_run(out / "noniid-0.5-fedce-fedgate-0")
    assert read_run(out / name).record.files["extractor.safetensors"] == base.record.files["extractor.safetensors"]
    assert done["noniid-0.5-fedce-baselines-0"] == json.loads((base.folder / "baselines.json").read_text())


def test_finished_units_are_not_repeated(made):
    out, done, _ = made
    again = work(out, "paper", QUICK, units([FIGURE_PARTITION], 1), pytest.fail, None)
    assert again == done


def test_other_settings_are_refused_and_named(made):
    out, _, _ = made
    with pytest.raises(RunError, match=r"fedce\.extractor\.rounds was 2 and is 3"):
        work(out, "paper", {**QUICK, "extractor": {"rounds": 3, "local_epochs": 1}}, [], quiet, None)


def test_a_table_shows_each_figure_in_its_cell_and_a_dash_for_missing_ones(made):
    _, done, _ = made
    lines = {line[:22].strip(): line[22:].split() for line in table(1, done, 1).splitlines()}
    figures = done["noniid-0.5-fedsc-rangate-0"]["own"]
    cell = "/".join(f"{100 * figures[key]:.1f}" for key in ("accuracy", "macro_f1", "auc"))
    assert lines["FedSC + RanGate"] == ["–", cell, "–", "–"]
    assert lines["the paper"] == ["–", "66.7/8.0/50.0", "76.9/8.7/50.0", "83.3/9.1/50.0"]
    balanced = {line[:22].strip(): line[22:].split() for line in table(2, done, 1).splitlines()}
    figures = done["noniid-0.5-fedce-baselines-0"]["local"]["iid"]
    assert balanced["Local classifier"][1].startswith(f"{100 * figures['accuracy']:.1f}/")
    assert "the paper" not in balanced


def test_a_cell_is_the_mean_of_its_seeds(made):
    _, done, _ = made
    name = "noniid-0.5-fedce-fedgate-"
    figures = {"accuracy": 0.25, "macro_f1": 0.5, "auc": None}
    two = {**done, f"{name}0": {"own": {**figures, "accuracy": 0.75}}, f"{name}1": {"own": figures}}
    assert len(figures_of(two, "fedce-fedgate", FIGURE_PARTITION, "own", 2)) == 2
    lines = {line[:22].strip(): line[22:].split() for line in table(1, two, 2).splitlines()}
    assert lines["FedCE + FedGate"][1] == "50.0/50.0/–"


@pytest.mark.parametrize("number", [3, 4])
def test_a_figure_is_a_page_with_charts(made, tmp_path, number):
    _, done, _ = made
    text = draw(tmp_path, number, done).read_text(encoding="utf-8")
    assert text.count("<svg") >= 3
    if number == 3:
        kept = done["noniid-0.5-fedsc-fedgate-0"]["own"]["kept_local"]
        assert f"{100 * kept:.0f} % of the rows are answered locally; in the paper 25 %" in text


def test_the_commands_stop_in_time_continue_and_print(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "PARTITIONS", (FIGURE_PARTITION,))
    options = [f"--set={s}.{k}={v}" for s, values in QUICK.items() for k, v in values.items()]
    stopped = run_main(main, "table", "2", "--minutes", "0", *options)
    assert stopped.exit_code == 0
    assert stopped.output.endswith(
        "0 of 7 parts are done and saved in paper/digits/paper.json; run the same command again to continue\n"
    )
    assert "[1/7] noniid:0.5, fedce, fedgate, seed 0" in stopped.error
    shown = run_main(main, "table", "2", *options)
    assert shown.exit_code == 0, shown.error
    assert "FedSC + FedGate" in shown.output
    assert run_main(main, "figure", "4", *options).output == "wrote paper/digits/figure-4.html\n"
    assert run_main(main, "figure", "5", *options).exit_code == 2


def test_baselines_that_are_stopped_resume_to_the_same_figures(made, tmp_path):
    import shutil

    out, done, _ = made
    folder = shutil.copytree(out / "noniid-0.5-fedce-fedgate-0", tmp_path / "run")
    (folder / "baselines.json").unlink()

    def stop(finished):
        if finished.stage == "centralised":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baselines(read_run(folder), stop, METHODS)
    assert set(json.loads((folder / "baselines.json").read_text())) == {"local", "fedavg", "fedavg_prior"}
    assert baselines(read_run(folder), methods=METHODS) == done["noniid-0.5-fedce-baselines-0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "Centralised mixture" in (folder / "report.html").read_text(encoding="utf-8")
