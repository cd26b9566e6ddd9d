from __future__ import annotations

import sys

import pytest

from nmoe_train.cli import main
from nmoe_train.results.paper.units import table_units


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A current folder in which `paper/digits` is the finished folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/digits").symlink_to(made.plan.out)
    return tmp_path / "paper/digits"


def test_a_table_is_printed_and_written_in_three_formats(folder, run_main, quick_options):
    shown = run_main(main, "table", "2", "--partitions", "noniid:0.5", *quick_options)
    assert shown.exit_code == 0, shown.error
    assert shown.output == (folder / "table-2.txt").read_text()
    assert "FedSC + FedGate" in shown.output
    latex = run_main(main, "table", "2", "--partitions", "noniid:0.5", "--format", "latex", *quick_options)
    assert latex.output == (folder / "table-2.tex").read_text()
    assert (folder / "table-2.csv").read_text().startswith("table,method,partition,metric,mean,std,seeds,paper\n")


def test_the_table_stops_in_time_and_says_how_to_continue(run_main, tmp_path, monkeypatch, quick_options):
    monkeypatch.chdir(tmp_path)
    stopped = run_main(main, "table", "1", "--partitions", "iid", "--minutes", "0", *quick_options)
    assert stopped.exit_code == 0
    parts = len(table_units(["iid"], 1))
    assert stopped.output.endswith(
        f"0 of {parts} parts are done and saved in paper/digits/paper.json; run the same command again to continue\n"
    )
    assert f"[1/{parts}] iid, fedce, fedgate, seed 0" in stopped.error
    assert "(90.4)" in stopped.output


def test_no_train_shows_what_the_folder_holds_whatever_its_settings(folder, run_main):
    shown = run_main(main, "table", "1", "--no-train")
    assert shown.exit_code == 0
    assert "FedCE + RollGate" in shown.output
    parts = len(table_units(["iid"], 1))
    assert f"{parts} of {4 * parts} parts are done" in shown.output
    assert "run the command without --no-train to continue" in shown.output


def test_figures_are_pages_and_files_for_a_paper(folder, run_main, quick_options):
    pytest.importorskip("matplotlib")
    options = ("--partitions", "noniid:0.5", *quick_options)
    for name, file in (("3", "figure-3"), ("4b", "figure-4b"), ("curves", "curves")):
        shown = run_main(main, "figure", name, *options)
        assert shown.output.splitlines() == [f"wrote paper/digits/{file}.{suffix}" for suffix in ("html", "pdf", "png")]
        assert (folder / f"{file}.html").read_text().count("<svg") >= 1


def test_without_matplotlib_the_page_is_written_and_one_line_says_what_to_install(
    folder, run_main, quick_options, monkeypatch
):
    monkeypatch.delitem(sys.modules, "nmoe_train.results.paper.plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("matplotlib"), *sys.meta_path])
    shown = run_main(main, "figure", "3", *quick_options)
    assert shown.exit_code == 1
    assert shown.output == "wrote paper/digits/figure-3.html\n"
    assert shown.error == "nmoe-train: matplotlib is not installed; pip install 'nmoe[train]'\n"


class _Without:
    """Finds no package of this name."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, _path=None, _target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_figure_4a_is_trained_for_each_number_of_clients(run_main, tmp_path, monkeypatch, quick_options):
    monkeypatch.chdir(tmp_path)
    options = ("--partitions", "noniid:0.5", "--clients", "2,4", "--minutes", "0", *quick_options)
    shown = run_main(main, "figure", "4a", *options)
    assert shown.exit_code == 0, shown.error
    assert shown.output.startswith("0 of 4 parts are done")
    assert "[1/4] noniid:0.5, fedce, fedgate, seed 0, 2 clients" in shown.error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("table", "1", "--partitions", "noiid"), "unknown partition 'noiid'"),
        (("table", "1", "--partitions", " , "), "--partitions is ' , '; name at least one split"),
        (("table", "1", "--minutes", "-1"), "--minutes is -1.0; it must be 0 or more"),
        (("table", "1", "--set", "seed=2"), "seed varies over the table; leave it out"),
        (("figure", "3", "--clients", "5"), "--clients belongs to figure 4a"),
        (("figure", "3", "--seeds", "2"), "figure 3 shows one split and one seed"),
        (("figure", "4a", "--clients", "5,x"), "--clients is '5,x'; expected numbers in 2..1024"),
        (("figure", "4a", "--clients", "1"), "expected numbers in 2..1024"),
        (("figure", "4a", "--clients", "1000"), "among 1000 clients leaves 1 of 1200 training samples per client"),
        (("figure", "curves", "--seeds", "2"), "learning curves show seed 0"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(run_main, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    shown = run_main(main, *arguments)
    assert (shown.exit_code, shown.output) == (1, "")
    assert text in shown.error
    assert shown.error.count("\n") == 1


def test_the_old_name_of_the_learning_curves_is_refused(run_main):
    shown = run_main(main, "figure", "4")
    assert shown.exit_code == 2
    assert "'4a', '4b', 'curves'" in shown.error
