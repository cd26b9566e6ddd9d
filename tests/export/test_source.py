"""Anybody's modules, and which of their samples calibrate and which measure."""

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


def test_what_a_module_answers_belongs_to_the_key_and_so_do_names_and_top_k(images):
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
        ({"experts": [nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 5)]}, "all must put out as many"),
        ({"experts": [nn.Linear(9, 4)] * 3}, "expert 0 fails on rows of"),
        ({"calibration": np.zeros((3, 4))}, "calibration is float64"),
        ({"labels": np.zeros(3)}, "labels are float64"),
        ({"labels": np.full(80, 9)}, "labels are not in 0..3"),
        ({"names": ["a"]}, "1 name for 4 outputs"),
        ({"names": 4}, "names are text"),
        ({"top_k": 9}, "top_k is 9, not in 1..3"),
        ({"experts": []}, "one of each at least"),
        ({"calibration": [[1.0]]}, "are numpy arrays"),
        ({"extractor": nn.Flatten()}, "the extractor does not make float32 rows"),
    ],
)
def test_modules_that_do_not_fit_are_one_line(images, change, text):
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


def test_the_command_takes_modules_and_says_what_int8_is_worth(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_fleet.py").write_text(FACTORY)
    shown = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100")
    assert shown.exit_code == 0, shown.error
    assert "bundles/their_fleet: 2 bundles" in shown.output
    assert "2.00 ×" in shown.output
    again = run_main(main, "--modules", "their_fleet:fleet", "--int8", "--max-drop", "100", "--json")
    assert set(json.loads(again.output)) >= {"is", "drop", "speed"}
    for arguments, text in (
        (("--modules", "their_fleet:wrong"), "returns no arguments"),
        (("--modules", "their_fleet:nothing"), "must return a dict of extractor, gate, experts and calibration"),
        (("--modules", "nowhere:fleet"), "no module nowhere lies in the current folder, nor is installed"),
        (("--modules", "their_fleet.inner:fleet"), "no module their_fleet.inner lies in"),
        (("--modules", "their_fleet"), "MODULE:FACTORY is due"),
        (("--modules", "their_fleet.py:fleet"), "MODULE:FACTORY is due"),
        (("--modules", "../theirs:fleet"), "MODULE:FACTORY is due, such as theirs:fleet"),
        (("--modules", "their_fleet:flet"), "has no attribute 'flet'"),
        (("--modules", "their_fleet:fleet", "run"), "two sources"),
        (("--modules", "their_fleet:fleet", "--int8", "--target", "watch"), "no target is called 'watch'"),
        (("--modules", "their_fleet:fleet", "--int8", "--calibration", "best"), "there are default"),
        (("--modules", "their_fleet:fleet", "--max-drop", "nan"), "not a number from 0 on"),
    ):
        refused = run_main(main, *arguments)
        assert (refused.exit_code, refused.error.count("\n")) == (1, 1), refused.error
        assert text in refused.error


def test_samples_that_nobody_said_were_held_out_are_not_called_so(source, tmp_path, run_main):
    export_fleet(source, tmp_path / "fleet")
    shown = run_main(edge_main, "inspect", tmp_path / "fleet" / "device-00").output
    assert re.search(r"^accuracy +samples given [0-9.]+%$", shown, re.M)
    assert "held" not in shown


def test_of_each_clients_samples_every_second_one_is_shown_and_the_others_measure(source):
    assert np.array_equal(source.shown, np.arange(1, 80, 2))
    assert np.array_equal(source.measured, np.arange(0, 80, 2))
    dealt = replace(source, clients=np.repeat([0, 1, 2], [25, 1, 54]))
    assert [np.isin(dealt.shown, np.flatnonzero(dealt.clients == client)).sum() for client in range(3)] == [12, 0, 27]
    both = np.concatenate([dealt.shown, dealt.measured])
    assert np.array_equal(np.sort(both), np.arange(80))
    samples = samples_of(dealt, Recipe())
    assert np.array_equal(samples.inputs, dealt.inputs[dealt.shown])
    assert np.array_equal(samples.clients, dealt.clients[dealt.shown])


def test_too_few_shown_samples_are_counted_and_so_are_those_that_measure(images):
    few = of_modules(*modules(), images[:41])
    with pytest.raises(
        SourceError, match="20 calibration samples; the recipe asks for 32 at least; the other half, 21,"
    ):
        samples_of(few, Recipe())
    assert len(samples_of(few, Recipe(least=20)).inputs) == 20


def test_somebodys_file_calibrates_in_place_of_the_shown_half(source, images, tmp_path):
    path = tmp_path / "theirs.npz"
    np.savez(path, inputs=images[::-1])
    samples = samples_of(replace(source, clients=np.arange(80) % 3), Recipe(data=f"npz:{path}", samples=50))
    assert len(samples.inputs) == 50
    assert samples.clients is None
    for array, text in (
        (images[:20], "20 calibration samples; the recipe asks for 32 at least$"),
        (images[:, 0], "inputs are uint8"),
    ):
        np.savez(path, inputs=array)
        with pytest.raises(SourceError, match=text):
            samples_of(source, Recipe(data=f"npz:{path}"))


def test_a_file_of_samples_that_is_missing_is_one_line_that_names_it(run_main, golden, tmp_path):
    (tmp_path / "recipe.toml").write_text(f'data = "npz:{tmp_path / "nowhere.npz"}"')
    shown = run_main(main, golden / "run", "--int8", "--calibration", tmp_path / "recipe.toml", "--out", tmp_path / "x")
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == f"nmoe-export: {tmp_path / 'nowhere.npz'}: No such file or directory\n"


def test_an_error_of_our_own_is_not_taken_for_a_wrong_argument(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "third_fleet.py").write_text(FACTORY)
    monkeypatch.setattr("nmoe_export.source._digest", lambda: None)
    with pytest.raises(TypeError, match="positional arguments"):
        of_factory("third_fleet:fleet")
