from __future__ import annotations

import pytest
import torch

from nmoe_train.checkpoint import NAME, Checkpoint, claimed, difference, partial
from nmoe_train.errors import RunError


def test_a_checkpoint_comes_back_whole_and_keeps_shared_weights_once(tmp_path):
    shared = {"w": torch.randn(3)}
    states = {"extractor": [shared] * 3, "gate": [{"b": torch.ones(2) * i} for i in range(3)]}
    written = Checkpoint({"seed": 1}, "gate", 4, states, [{"loss": 0.1}])
    written.write(tmp_path / "c.safetensors")
    back = Checkpoint.read(tmp_path / "c.safetensors")
    assert (back.config, back.stage, back.round, back.history) == ({"seed": 1}, "gate", 4, [{"loss": 0.1}])
    assert back.states["extractor"][0] is back.states["extractor"][2]
    assert [state["b"][0].item() for state in back.states["gate"]] == [0, 1, 2]


def test_the_first_difference_is_named_with_its_place():
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 1}) == "a.b was 1 and is 2"
    assert difference({}, {"c": 1}) == "c was None and is 1"


def test_a_flipped_byte_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    Checkpoint({"seed": 1}, "gate", 4, {"gate": [{"b": torch.ones(40)}]}, [{"loss": 0.125}]).write(path)
    good = path.read_bytes()
    for place in range(8, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(RunError, match=r"no checkpoint to go on from.*remove"):
            Checkpoint.read(path)


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe_train.checkpoint._FACTS", ("config", "stage"))
    Checkpoint({}).write(tmp_path / "c.safetensors")
    monkeypatch.undo()
    with pytest.raises(RunError, match="another version"):
        Checkpoint.read(tmp_path / "c.safetensors")


def test_a_place_is_claimed_by_one_at_a_time_and_given_back(tmp_path):
    with claimed(tmp_path / "run") as path:
        assert path == tmp_path / "run.partial" / NAME
        with pytest.raises(RunError, match="another process"), claimed(tmp_path / "run"):
            pass
    assert not partial(tmp_path / "run").exists()
    with claimed(tmp_path / "run") as path:
        path.touch()
    assert path.exists()
    with claimed(tmp_path / "run"):
        pass
