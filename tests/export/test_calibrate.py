"""Ranges compared with numpy, and recipes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nmoe_export import calibrate
from nmoe_export.calibrate import Recipe, draw_rows, ranges, read_recipe
from nmoe_export.errors import SourceError
from nmoe_export.graphs import export_graph

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    """One layer that negates every second column of its input."""
    layer = nn.Linear(4, 4, bias=False)
    layer.load_state_dict({"weight": torch.diag(torch.tensor([1.0, -1, 1, -1]))})
    return onnx.load_from_string(export_graph(layer, "layer", torch.zeros(2, 4)))


def rows(n=1000):
    return DRAW.normal(size=(n, 4)).astype(np.float32)


def only(found):
    (name,) = {name for name in found if name != "rows"}
    return found[name]


def test_minmax_is_the_minimum_and_maximum_over_all_batches(model):
    x = rows()
    out = x * [1, -1, 1, -1]
    found = ranges(model, x, Recipe(method="minmax"))
    assert found["rows"] == pytest.approx((x.min(), x.max()))
    assert only(found) == pytest.approx((out.min(), out.max()))


def test_a_percentile_cuts_off_equally_many_on_either_side(model):
    x = rows(8000)
    low, high = ranges(model, x, Recipe(method="percentile", percentile=99.0))["rows"]
    assert np.percentile(x, 0.5) == pytest.approx(low, abs=0.02)
    assert np.percentile(x, 99.5) == pytest.approx(high, abs=0.02)
    wide = ranges(model, x, Recipe(method="percentile", percentile=100.0))["rows"]
    assert wide == pytest.approx((x.min(), x.max()), abs=0.01)


def test_mse_finds_the_range_that_brute_force_finds(model):
    x = DRAW.laplace(size=(2000, 4)).astype(np.float32)
    found = ranges(model, x, Recipe(method="mse"))["rows"]

    def error(share):
        a, b = x.min() * share, x.max() * share
        step = (b - a) / 255
        return float(((np.rint((x.clip(a, b) - a) / step) * step + a - x) ** 2).mean())

    best = min(np.linspace(0.3, 1, 71), key=error)
    assert found[1] / x.max() == pytest.approx(best, abs=0.05)
    assert error(found[1] / x.max()) <= error(1.0)


def test_entropy_cuts_off_a_far_outlier_and_keeps_a_uniform_spread(model):
    even = DRAW.uniform(-1, 1, size=(4000, 4)).astype(np.float32)
    low, high = ranges(model, even, Recipe(method="entropy"))["rows"]
    assert high - low > 1.9
    wild = np.concatenate([rows(4000), np.full((1, 4), 60, np.float32)])
    assert ranges(model, wild, Recipe(method="entropy"))["rows"][1] < 30


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("kind", ["far from zero", "after a relu"])
def test_ranges_that_are_not_centred_on_zero_cut_off_at_most_about_one_percent(model, method, kind):
    x = DRAW.uniform(2, 5, (4000, 4)) if kind == "far from zero" else DRAW.laplace(size=(4000, 4)).clip(0)
    x = x.astype(np.float32)
    low, high = ranges(model, x, Recipe(method=method))["rows"]
    assert low < high
    assert (x > high).mean() <= 0.011


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_a_constant_tensor_has_a_range(model, method):
    low, high = ranges(model, np.full((40, 4), 2, np.float32), Recipe(method=method))["rows"]
    assert low <= high
    assert np.isfinite([low, high]).all()


def test_the_seed_decides_which_samples_are_drawn_and_too_few_are_refused():
    assert np.array_equal(draw_rows(100, Recipe(samples=40)), draw_rows(100, Recipe(samples=40)))
    assert not np.array_equal(draw_rows(100, Recipe(samples=40)), draw_rows(100, Recipe(samples=40, seed=1)))
    assert np.array_equal(draw_rows(100, Recipe()), np.arange(100))
    with pytest.raises(SourceError, match="20 calibration samples are too few: the recipe needs at least 32; add"):
        draw_rows(20, Recipe())


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_a_symmetric_range_is_equally_wide_on_either_side_and_optimal_for_its_step(model, method):
    x = DRAW.laplace(size=(2000, 4)).astype(np.float32).clip(-0.5, None)
    low, high = ranges(model, x, Recipe(method=method, percentile=99.0), symmetric=True)["rows"]
    assert low == -high
    if method == "percentile":
        assert (np.abs(x) > high).mean() == pytest.approx(0.01, abs=0.003)
    if method == "mse":
        edge = float(np.abs(x).max())
        steps = {share: edge * share / 127 for share in np.linspace(0.3, 1, 71)}
        errors = {s: float(((np.rint(x.clip(-edge * s, edge * s) / d) * d - x) ** 2).mean()) for s, d in steps.items()}
        assert high / edge == pytest.approx(min(errors, key=errors.get), abs=0.05)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_tensor_with_an_infinity_or_nan_has_no_range(model, method, value):
    x = rows(100)
    x[70, 1] = value
    assert not ranges(model, x, Recipe(method=method))


def test_at_most_one_batch_is_in_memory(model, monkeypatch):
    monkeypatch.setattr(calibrate, "BATCH", 8)
    held = []
    true = calibrate._Watched.batches

    def watched(self, inputs):
        for values in true(self, inputs):
            held.append(max(len(value) for value in values.values()))
            yield values

    monkeypatch.setattr(calibrate._Watched, "batches", watched)
    ranges(model, rows(100), Recipe(method="mse"))
    assert max(held) == 8
    assert len(held) == 2 * 13


@pytest.mark.parametrize("path", sorted(calibrate.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_recipe_can_be_read(path):
    assert read_recipe(path.stem) == read_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('methd = "mse"', "unknown key 'methd' .did you mean 'method'"),
        ('method = "best"', "expected one of 'minmax'"),
        ('data = "imagenet"', "data is 'imagenet'; expected run or npz:FILE"),
        ("percentile = 5.0", "percentile is 5.0; expected more than 50"),
        ("least = 9999999", "least is 9999999; expected 1..4096"),
        ("method =", "recipe.toml"),
    ],
)
def test_an_invalid_recipe_is_refused_with_a_reason(tmp_path, text, reason):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(SourceError, match=reason):
        read_recipe(str(tmp_path / "recipe.toml"))


def test_the_error_for_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(SourceError, match="recipes by name: default, entropy, minmax, percentile; or give a file.toml"):
        read_recipe("nowhere")


def test_the_default_recipe_is_that_of_its_file_and_needs_no_folder(monkeypatch, tmp_path):
    assert read_recipe(str(calibrate.FOLDER / "default.toml")) == Recipe() == read_recipe("default")
    monkeypatch.setattr(calibrate, "FOLDER", tmp_path / "nowhere")
    assert read_recipe("default") == Recipe()
