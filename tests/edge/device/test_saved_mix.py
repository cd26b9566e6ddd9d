from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.manifest import trunk_digest
from nmoe_edge.common.log import StderrLog
from nmoe_edge.common.npz import write_npz
from nmoe_edge.device.saved_mix import default_state, forget_mix, load_mix, mix_path, save_mix
from nmoe_edge.errors import EdgeError
from nmoe_edge.protocol.classmix import ClassMix

LOG = StderrLog("attic")


@pytest.fixture
def manifest(tiny_fleet):
    return read_bundle(tiny_fleet / "attic").manifest


@pytest.fixture
def learned():
    mix = ClassMix(3)
    mix.reweight(np.random.default_rng(0).dirichlet([3.0, 1.0, 1.0], 300).astype(np.float32))
    return mix


def loaded(state, manifest):
    mix = ClassMix(3)
    load_mix(state, manifest, mix, LOG)
    return mix


def test_a_saved_mix_is_loaded_again(tmp_path, manifest, learned, capsys):
    save_mix(tmp_path / "new" / "state", manifest, learned, LOG)
    mix = loaded(tmp_path / "new" / "state", manifest)
    assert np.array_equal(mix.saved_rows(), learned.saved_rows())
    assert mix.mix == pytest.approx(learned.mix)
    assert capsys.readouterr().err == ""


def test_saving_again_replaces_the_file(tmp_path, manifest, learned):
    save_mix(tmp_path, manifest, learned, LOG)
    learned.reweight(np.full((1, 3), 1 / 3, np.float32))
    save_mix(tmp_path, manifest, learned, LOG)
    assert list(tmp_path.iterdir()) == [mix_path(tmp_path, manifest)]
    assert loaded(tmp_path, manifest).rows == 301


def test_an_empty_mix_does_not_replace_a_saved_one(tmp_path, manifest, learned):
    save_mix(tmp_path, manifest, learned, LOG)
    save_mix(tmp_path, manifest, ClassMix(3), LOG)
    assert loaded(tmp_path, manifest).rows == 300


def test_loading_without_a_saved_mix_logs_nothing(tmp_path, manifest, capsys):
    assert loaded(tmp_path, manifest).rows == 0
    assert capsys.readouterr().err == ""


def test_another_device_or_trunk_loads_nothing(tmp_path, manifest, learned):
    save_mix(tmp_path, manifest, learned, LOG)
    assert loaded(tmp_path, replace(manifest, device="barn")).rows == 0
    source = "0" * 64
    trunk = trunk_digest(source, manifest.latent.dim, manifest.experts, manifest.outputs)
    assert loaded(tmp_path, replace(manifest, extractor_source=source, trunk=trunk)).rows == 0
    assert loaded(tmp_path, manifest).rows == 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zip",
        write_npz({"rows": np.full((2, 3), 1 / 3)})[:-9],
        write_npz({"others": np.full((2, 3), 1 / 3)}),
        write_npz({"rows": np.full((2, 4), 1 / 4)}),
        write_npz({"rows": np.full((2, 3), np.nan)}),
        write_npz({"rows": np.full(3, 1 / 3)}),
        write_npz({"rows": np.array(1.0)}),
    ],
    ids=["empty", "no zip", "cut off", "other name", "other width", "nan", "one row", "a number"],
)
def test_a_damaged_file_is_logged_and_ignored(tmp_path, manifest, capsys, data):
    path = mix_path(tmp_path, manifest)
    path.write_bytes(data)
    assert loaded(tmp_path, manifest).rows == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: cannot be read, and is learned again" in line


def test_a_damaged_file_is_replaced(tmp_path, manifest, learned):
    mix_path(tmp_path, manifest).write_bytes(b"no zip")
    save_mix(tmp_path, manifest, learned, LOG)
    assert loaded(tmp_path, manifest).rows == 300


def test_a_state_folder_that_is_a_file_is_logged_and_costs_nothing(tmp_path, manifest, learned, capsys):
    (tmp_path / "state").touch()
    save_mix(tmp_path / "state", manifest, learned, StderrLog("attic"))
    assert loaded(tmp_path / "state", manifest).rows == 0
    saving, loading = capsys.readouterr().err.splitlines()
    assert "class_mix_unsaved" in saving
    assert "cannot be written" in saving
    assert "learned again" in loading


def test_a_folder_that_cannot_be_written_is_logged(tmp_path, manifest, learned, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # permissions do not stop a test that runs as root
    save_mix(tmp_path, manifest, learned, StderrLog("attic"))
    assert "cannot be written: Permission denied" in capsys.readouterr().err


def test_forgetting_removes_the_mixes_of_one_device_only(tmp_path, manifest, learned):
    others = [replace(manifest, device=name) for name in ("barn", "attic-2", "attic.2", "attic2", "an-attic")]
    for device in (manifest, *others):
        save_mix(tmp_path, device, learned, LOG)
    forget_mix(tmp_path, "attic")
    assert set(tmp_path.iterdir()) == {mix_path(tmp_path, device) for device in others}


def test_a_mix_that_cannot_be_forgotten_is_an_error(tmp_path, manifest):
    mix_path(tmp_path, manifest).mkdir()  # cannot be unlinked, even by root
    with pytest.raises(EdgeError, match=r"-mix\.npz: the class mix cannot be forgotten: .*; make its folder") as caught:
        forget_mix(tmp_path, "attic")
    assert "\n" not in str(caught.value)


def test_forgetting_without_a_saved_mix_is_not_an_error(tmp_path):
    forget_mix(tmp_path / "nothing", "attic")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").touch()
    forget_mix(tmp_path / "file", "attic")


def test_the_default_state_folder_follows_the_users_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state() == tmp_path / "nmoe"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state() == tmp_path / ".local" / "state" / "nmoe"
