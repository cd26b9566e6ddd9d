from __future__ import annotations

import re
from pathlib import Path

import pytest
from train.drawings import pictures

import nmoe_train
from nmoe_train.results.paper.figures import figure_3, figure_4a, figure_4b, learning_curves, page_of
from nmoe_train.run import read_run


def test_figure_3_has_three_panels_with_f1_and_the_share_answered_locally(made, split):
    drawing = figure_3(made.done, split)
    own = made.done["noniid-0.5-fedsc-fedgate-0"]["own"]
    titles = [panel.title for panel in drawing.panels]
    ours = f"F1 {100 * own['macro_f1']:.1f} %, LR {100 * own['kept_local']:.0f} %"
    assert titles[0] == f"FedSC + FedGate: {ours} (paper: 54.8, 25)"
    assert titles[1].endswith("(paper: 90.2, 8)")
    assert "LR 100 %" in titles[2]
    assert drawing.panels[0].matrix == own["routing"]
    assert drawing.panels[2].matrix == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert len(pictures(page_of(drawing))) == 3


def test_figure_4a_compares_both_extractors_for_each_number_of_clients():
    def figures(own):
        return {"own": {"accuracy": own}, "iid": {"accuracy": own / 2}}

    done = {}
    for extractor, gain in (("fedce", 0.0), ("fedsc", 0.1)):
        for seed in range(2):
            done[f"noniid-0.2-{extractor}-fedgate-{seed}"] = figures(0.5 + gain + 0.1 * seed)
            done[f"noniid-0.2-{extractor}-fedgate-{seed}-20x30"] = figures(0.3 + gain)
    sizes = {("noniid:0.2", 10): None, ("noniid:0.2", 20): 30}
    (panel,) = figure_4a(done, sizes, 2).panels
    assert list(panel.series) == ["FedCE, own", "FedCE, balanced", "FedSC, own", "FedSC, balanced"]
    points = panel.series["FedSC, own"]
    assert {x: value.mean for x, value in points.items()} == {10: pytest.approx(65), 20: pytest.approx(40)}
    assert points[10].spread == pytest.approx(7.07, abs=0.01)


def test_figure_4b_has_a_point_for_every_k(made, split):
    drawing = figure_4b(made.done, [split], 1, 3)
    (panel,) = drawing.panels
    third = made.done["noniid-0.5-fedce-top-3-0"]["iid"]["accuracy"]
    assert panel.series["FedCE, balanced"][3].mean == pytest.approx(100 * third)
    assert list(panel.series["FedSC, own"]) == [1, 2, 3]
    (svg,) = pictures(page_of(drawing)).values()
    assert len(list(svg.iter("polyline"))) == 8  # four lines, and four in the legend


def test_learning_curves_come_from_the_histories_of_the_runs(made, split):
    runs = {(split, e): read_run(made.plan.out / f"noniid-0.5-{e}-fedgate-0") for e in ("fedce", "fedsc")}
    drawing = learning_curves({key: run.metrics["history"] for key, run in runs.items()})
    assert [panel.title for panel in drawing.panels][1:3] == ["Loss of FedCE", "Loss of FedSC"]
    assert list(drawing.panels[4].series[split]) == [1, 2]
    assert page_of(drawing).count("<svg") == 5


def test_a_figure_is_saved_as_pdf_and_png_and_twice_the_same(made, split, tmp_path):
    pytest.importorskip("matplotlib")
    from nmoe_train.results.paper.plots import save

    for drawing in (figure_3(made.done, split), figure_4b(made.done, [split], 1, 3)):
        pdf, png = save(drawing, tmp_path)
        assert pdf.read_bytes().startswith(b"%PDF")
        assert png.read_bytes().startswith(b"\x89PNG")
        before = (pdf.read_bytes(), png.read_bytes())
        assert [path.read_bytes() for path in save(drawing, tmp_path)] == list(before)


def test_matplotlib_is_imported_by_one_module_alone():
    package = Path(nmoe_train.__file__).parent
    users = [path.name for path in package.rglob("*.py") if re.search(r"(import|from) matplotlib", path.read_text())]
    assert users == ["plots.py"]
