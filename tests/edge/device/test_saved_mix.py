from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.manifest import trunk_digest
from nmoe_edge.common.log import Log
from nmoe_edge.common.npz import write_npz
from nmoe_edge.device.saved_mix import default_state, forget_mix, keep_mix, kept_mix, mix_path
from nmoe_edge.protocol.classmix import ClassMix

LOG = Log("attic")


@pytest.fixture
def manifest(tiny_fleet):
    return read_bundle(tiny_fleet / "attic").manifest


@pytest.fixture
def learnt():
    mix = ClassMix(3)
    mix.weighed(np.random.default_rng(0).dirichlet([3.0, 1.0, 1.0], 300).astype(np.float32))
    return mix


def recalled(state, manifest):
    mix = ClassMix(3)
    kept_mix(state, manifest, mix, LOG)
    return mix


def test_what_was_kept_is_recalled(tmp_path, manifest, learnt, capsys):
    keep_mix(tmp_path / "new" / "state", manifest, learnt, LOG)
    mix = recalled(tmp_path / "new" / "state", manifest)
    assert np.array_equal(mix.remembered(), learnt.remembered())
    assert mix.mix == pytest.approx(learnt.mix)
    assert capsys.readouterr().err == ""


def test_one_file_is_left_and_the_newest_is_what_it_holds(tmp_path, manifest, learnt):
    keep_mix(tmp_path, manifest, learnt, LOG)
    learnt.weighed(np.full((1, 3), 1 / 3, np.float32))
    keep_mix(tmp_path, manifest, learnt, LOG)
    assert list(tmp_path.iterdir()) == [mix_path(tmp_path, manifest)]
    assert recalled(tmp_path, manifest).rows == 301


def test_nothing_learnt_is_not_kept_over_what_was(tmp_path, manifest, learnt):
    keep_mix(tmp_path, manifest, learnt, LOG)
    keep_mix(tmp_path, manifest, ClassMix(3), LOG)
    assert recalled(tmp_path, manifest).rows == 300


def test_a_device_that_has_learnt_nothing_says_nothing(tmp_path, manifest, capsys):
    assert recalled(tmp_path, manifest).rows == 0
    assert capsys.readouterr().err == ""


def test_another_device_or_trunk_recalls_nothing(tmp_path, manifest, learnt):
    keep_mix(tmp_path, manifest, learnt, LOG)
    assert recalled(tmp_path, replace(manifest, device="barn")).rows == 0
    source = "0" * 64
    trunk = trunk_digest(source, manifest.latent.dim, manifest.experts, manifest.outputs)
    assert recalled(tmp_path, replace(manifest, extractor_source=source, trunk=trunk)).rows == 0
    assert recalled(tmp_path, manifest).rows == 300


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
def test_a_damaged_file_is_learnt_anew_with_a_line_in_the_log(tmp_path, manifest, capsys, data):
    path = mix_path(tmp_path, manifest)
    path.write_bytes(data)
    assert recalled(tmp_path, manifest).rows == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: cannot be read, and is learnt anew" in line


def test_a_damaged_file_is_replaced(tmp_path, manifest, learnt):
    mix_path(tmp_path, manifest).write_bytes(b"no zip")
    keep_mix(tmp_path, manifest, learnt, LOG)
    assert recalled(tmp_path, manifest).rows == 300


def test_a_state_folder_that_is_a_file_is_a_line_in_the_log_and_no_end(tmp_path, manifest, learnt, capsys):
    (tmp_path / "state").touch()
    keep_mix(tmp_path / "state", manifest, learnt, Log("attic"))
    assert recalled(tmp_path / "state", manifest).rows == 0
    kept, read = capsys.readouterr().err.splitlines()
    assert "not kept" in kept
    assert "learnt anew" in read


def test_a_folder_that_cannot_be_written_to_is_a_line_in_the_log(tmp_path, manifest, learnt, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a test may run as root, whom no folder refuses
    keep_mix(tmp_path, manifest, learnt, Log("attic"))
    assert "not kept: Permission denied" in capsys.readouterr().err


def test_forgetting_removes_that_devices_alone(tmp_path, manifest, learnt):
    others = [replace(manifest, device=name) for name in ("barn", "attic-2", "attic.2", "attic2", "an-attic")]
    for one in (manifest, *others):
        keep_mix(tmp_path, one, learnt, LOG)
    forget_mix(tmp_path, "attic")
    assert set(tmp_path.iterdir()) == {mix_path(tmp_path, one) for one in others}


def test_forgetting_where_nothing_was_kept_is_no_error(tmp_path):
    forget_mix(tmp_path / "nothing", "attic")
    assert not (tmp_path / "nothing").exists()


def test_state_is_kept_where_the_user_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state() == tmp_path / "nmoe"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state() == tmp_path / ".local" / "state" / "nmoe"
