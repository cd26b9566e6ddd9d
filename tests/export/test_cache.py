"""The cache of calibration ranges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from nmoe_export import cache
from nmoe_export.cache import cached_ranges
from nmoe_export.calibrate import Recipe, ranges
from nmoe_export.graphs import export_graph

ROWS = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return onnx.load_from_string(export_graph(nn.Linear(4, 3), "layer", torch.zeros(2, 4)))


@pytest.fixture
def found(monkeypatch):
    """The calls that computed ranges."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return ranges(*arguments)

    monkeypatch.setattr(cache, "ranges", counted)
    return calls


def files():
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "nmoe" / "calibration").iterdir())


def test_ranges_of_the_same_graph_and_samples_come_from_the_cache(model, found):
    first = cached_ranges(model, ROWS, Recipe(), False)
    assert first == ranges(model, ROWS, Recipe())
    assert cached_ranges(model, ROWS.copy(), Recipe(), False) == first
    assert len(found) == 1
    (path,) = files()
    assert path.suffix == ".json"


def test_everything_that_decides_a_range_is_part_of_the_key(model, found, monkeypatch):
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.initializer[0].raw_data = bytes(48)
    cached_ranges(model, ROWS, Recipe(), False)
    cached_ranges(other, ROWS, Recipe(), False)
    cached_ranges(model, ROWS[1:], Recipe(), False)
    cached_ranges(model, ROWS, Recipe(method="minmax"), False)
    cached_ranges(model, ROWS, Recipe(), True)
    monkeypatch.setattr(cache, "version", lambda package: "0.0")
    cached_ranges(model, ROWS, Recipe(), False)
    assert len(found) == 6


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100000,
        b"\xff",
        b'{"sha256": "0", "ranges": {"rows": [0, 1]}}',
        b'{"sha256": "0", "ranges": 3}',
    ],
    ids=range(7),
)
def test_a_damaged_cache_file_is_replaced(model, found, damage):
    first = cached_ranges(model, ROWS, Recipe(), False)
    (path,) = files()
    path.write_bytes(damage)
    assert cached_ranges(model, ROWS, Recipe(), False) == first
    assert cached_ranges(model, ROWS, Recipe(), False) == first
    assert len(found) == 2


def test_a_cache_file_with_one_changed_number_is_not_used(model, found):
    first = cached_ranges(model, ROWS, Recipe(), False)
    (path,) = files()
    plain = json.loads(path.read_text())
    plain["ranges"]["rows"][1] *= 2
    path.write_text(json.dumps(plain))
    assert cached_ranges(model, ROWS, Recipe(), False) == first
    assert len(found) == 2


@pytest.mark.parametrize("trouble", ["a file is in the way", "the disk is full", "no home"])
def test_a_cache_that_cannot_be_written_does_not_fail_the_export(model, tmp_path, monkeypatch, trouble):
    if trouble == "a file is in the way":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif trouble == "the disk is full":

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", homeless)
    assert cached_ranges(model, ROWS, Recipe(), False) == ranges(model, ROWS, Recipe())
    if trouble == "the disk is full":
        assert files() == []


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache._folder() == tmp_path / ".cache" / "nmoe" / "calibration"
