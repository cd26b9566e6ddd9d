"""Sources made of your own modules, and which samples calibrate and which measure."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from export.foreign import modules
from torch import nn

from nmoe_edge.cli import main as edge_main
from nmoe_export.calibrate import Recipe
from nmoe_export.cli import main
from nmoe_export.errors import SourceError
from nmoe_export.export import export_fleet
from nmoe_export.samples import samples_of
from nmoe_export.source import of_factory, of_modules


def test_the_key_covers_what_modules_answer_and_names_and_top_k(images):
    class Capped(nn.Linear):
        cap = 1.0

        def forward(self, h):
            return super().forward(h).clamp(max=self.cap)

    torch.manual_seed(0)
    extractor, gate, experts = modules()
    experts[1] = Capped(8, 4)
    first = of_modules(extractor, gate, experts, images).key
    assert of_modules(extractor, gate, experts, images).key == first
    assert of_modules(extractor, gate, experts, images, top_k=2).key != first
    assert of_modules(extractor, gate, experts, images, names=list("abcd")).key != first
    experts[1].cap = -1.0
    assert of_modules(extractor, gate, experts, images).key != first


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gate": nn.Linear(8, 2)}, "1 gate with 2 scores cannot choose among 3 experts"),
        ({"experts": [nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 5)]}, "all must return the same number"),
        ({"experts": [nn.Linear(9, 4)] * 3}, "expert 0 fails on rows of"),
        ({"calibration": np.zeros((3, 4))}, "calibration is float64"),
        ({"labels": np.zeros(3)}, "labels are float64"),
        ({"labels": np.full(80, 9)}, "labels are 9..9; expected 0..3"),
        ({"names": ["a"]}, "1 name for 4 outputs"),
        ({"names": 4}, "names must be a list of printable text"),
        ({"top_k": 9}, "top_k is 9; expected 1..3"),
        ({"experts": []}, "at least one of each"),
        ({"calibration": [[1.0]]}, "must be numpy arrays"),
        ({"extractor": nn.Flatten()}, "the extractor returned uint8; it must return float32"),
    ],
)
def test_modules_that_do_not_fit_are_refused(images, change, text):
    extractor, gate, experts = modules()
    arguments = {"extractor": extractor, "gate": gate, "experts": experts, "calibration": images, **change}
    with pytest.raises(SourceError, match=text):
        of_modules(**arguments)


FACTORY = """
import numpy as np
from torch import nn

def fleet():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    return dict(extractor=net, gate=nn.Linear(4, 2), experts=[nn.Linear(4, 3), nn.Linear(4, 3)],
                calibration=np.ones((80, 6), np.float32))

def wrong():
    return dict(extractr=None)

def nothing():
    pass
"""


def test_the_command_exports_modules_and_prints_what_int8_gains(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_fleet.py").write_text(FACTORY)
    shown = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100")
    assert shown.exit_code == 0, shown.error
    assert "bundles/their_fleet: 2 bundles" in shown.output
    assert "2.00 ×" in shown.output
    again = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100", "--json")
    assert set(json.loads(again.output)) >= {"is", "drop", "speed"}
    for arguments, text in (
        (
            ("--modules", "their_fleet:wrong"),
            "names and top_k: missing a required argument",
        ),
        (("--modules", "their_fleet:nothing"), "must return a dict of extractor, gate, experts and calibration; it "),
        (("--modules", "nowhere:fleet"), "there is no module nowhere in the current folder, and none is installed"),
        (("--modules", "their_fleet.inner:fleet"), "there is no module their_fleet.inner in"),
        (("--modules", "their_fleet"), "expected MODULE:FACTORY"),
        (("--modules", "their_fleet.py:fleet"), "expected MODULE:FACTORY"),
        (("--modules", "../theirs:fleet"), "expected MODULE:FACTORY, such as theirs:fleet"),
        (("--modules", "their_fleet:flet"), "has no attribute 'flet'"),
        (("--modules", "their_fleet:fleet", "run"), "give either a run or --modules, not both"),
        (
            ("--modules", "their_fleet:fleet", "--int8", "--target", "watch"),
            "unknown target 'watch'; expected auto",
        ),
        (("--modules", "their_fleet:fleet", "--int8", "--calibration", "best"), "recipes by name: default"),
        (
            ("--modules", "their_fleet:fleet", "--max-drop", "nan"),
            "--max-drop nan: expected 0 or more",
        ),
    ):
        refused = run_main(main, *arguments)
        assert (refused.exit_code, refused.error.count("\n")) == (1, 1), refused.error
        assert text in refused.error


def test_samples_of_modules_are_not_called_held_out(source, tmp_path, run_main):
    export_fleet(source, tmp_path / "fleet")
    shown = run_main(edge_main, "inspect", tmp_path / "fleet" / "device-00").output
    assert re.search(r"^accuracy +samples given [0-9.]+%$", shown, re.M)
    assert "held" not in shown


def test_every_second_sample_of_each_client_calibrates_and_the_others_measure(source):
    assert np.array_equal(source.calibration_rows, np.arange(1, 80, 2))
    assert np.array_equal(source.measured_rows, np.arange(0, 80, 2))
    dealt = replace(source, clients=np.repeat([0, 1, 2], [25, 1, 54]))
    assert [np.isin(dealt.calibration_rows, np.flatnonzero(dealt.clients == client)).sum() for client in range(3)] == [
        12,
        0,
        27,
    ]
    both = np.concatenate([dealt.calibration_rows, dealt.measured_rows])
    assert np.array_equal(np.sort(both), np.arange(80))
    samples = samples_of(dealt, Recipe())
    assert np.array_equal(samples.inputs, dealt.inputs[dealt.calibration_rows])
    assert np.array_equal(samples.clients, dealt.clients[dealt.calibration_rows])


def test_the_error_for_too_few_samples_counts_both_halves(images):
    few = of_modules(*modules(), images[:41])
    with pytest.raises(
        SourceError,
        match="20 calibration samples are too few: .* at least 32; .*; the other 21 samples measure",
    ):
        samples_of(few, Recipe())
    assert len(samples_of(few, Recipe(least=20)).inputs) == 20


def test_a_samples_file_calibrates_in_place_of_the_runs_samples(source, images, tmp_path):
    path = tmp_path / "theirs.npz"
    np.savez(path, inputs=images[::-1])
    samples = samples_of(replace(source, clients=np.arange(80) % 3), Recipe(data=f"npz:{path}", samples=50))
    assert len(samples.inputs) == 50
    assert samples.clients is None
    for array, text in (
        (images[:20], "20 calibration samples are too few: the recipe needs at least 32; .* in the recipe$"),
        (images[:, 0], "each row of inputs is uint8"),
    ):
        np.savez(path, inputs=array)
        with pytest.raises(SourceError, match=text):
            samples_of(source, Recipe(data=f"npz:{path}"))


def test_a_missing_samples_file_is_named_in_one_line(run_main, golden, tmp_path):
    (tmp_path / "recipe.toml").write_text(f'data = "npz:{tmp_path / "nowhere.npz"}"')
    shown = run_main(main, golden / "run", "--int8", "--calibration", tmp_path / "recipe.toml", "--out", tmp_path / "x")
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == f"nmoe-export: {tmp_path / 'nowhere.npz'}: No such file or directory\n"


def test_a_type_error_in_our_own_code_is_not_reported_as_a_wrong_argument(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "third_fleet.py").write_text(FACTORY)
    monkeypatch.setattr("nmoe_export.source._digest", lambda: None)
    with pytest.raises(TypeError, match="positional arguments"):
        of_factory("third_fleet:fleet")
