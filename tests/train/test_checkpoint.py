from __future__ import annotations

import pytest
import torch

from nmoe_train.checkpoint import CHECKPOINT_FILE, Checkpoint, claim_folder, difference, partial_folder
from nmoe_train.errors import RunError


def test_a_checkpoint_is_read_back_complete_and_shares_what_clients_share(tmp_path):
    shared = {"w": torch.randn(3)}
    states = {"extractor": [shared] * 3, "gate": [{"b": torch.ones(2) * i} for i in range(3)]}
    written = Checkpoint({"seed": 1}, "gate", 4, states, [{"loss": 0.1}])
    written.write(tmp_path / "c.safetensors")
    read = Checkpoint.read(tmp_path / "c.safetensors")
    assert (read.config, read.stage, read.round, read.history) == ({"seed": 1}, "gate", 4, [{"loss": 0.1}])
    assert read.states["extractor"][0] is read.states["extractor"][2]
    assert [state["b"][0].item() for state in read.states["gate"]] == [0, 1, 2]


def test_weights_in_another_memory_format_are_saved(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    Checkpoint({}, states={"local": [{"w": weight}, {"w": weight + 1}]}).write(tmp_path / "c.safetensors")
    assert torch.equal(Checkpoint.read(tmp_path / "c.safetensors").states["local"][0]["w"], weight)


def test_the_first_difference_is_reported_with_its_setting():
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 1}) == "a.b was 1 and is 2"
    assert difference({}, {"c": 1}) == "c was None and is 1"


def test_a_flipped_bit_anywhere_is_detected(tmp_path):
    path = tmp_path / "c.safetensors"
    Checkpoint({"seed": 1}, "gate", 4, {"gate": [{"b": torch.ones(40)}]}, [{"loss": 0.125}]).write(path)
    good = path.read_bytes()
    for position in range(8, len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(RunError, match=r"cannot be resumed.*remove"):
            Checkpoint.read(path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe_train.checkpoint._FACTS", ("config", "stage"))
    Checkpoint({}).write(tmp_path / "c.safetensors")
    monkeypatch.undo()
    with pytest.raises(RunError, match="another version"):
        Checkpoint.read(tmp_path / "c.safetensors")


def test_a_checkpoint_of_version_0_2_can_be_resumed(tmp_path, monkeypatch):
    old = ("command", "config", "stage", "round", "history", "fingerprint", "seconds")
    monkeypatch.setattr("nmoe_train.checkpoint._FACTS", old)
    monkeypatch.setattr(Checkpoint, "seconds", {"extractor": 2.5}, raising=False)
    Checkpoint({"seed": 1}, "gate", 4, {"gate": [{"b": torch.ones(4)}]}).write(tmp_path / "c.safetensors")
    monkeypatch.undo()
    read = Checkpoint.read(tmp_path / "c.safetensors")
    assert (read.stage, read.usage) == ("gate", {"extractor": {"seconds": 2.5}})


def test_only_one_process_at_a_time_claims_a_folder(tmp_path):
    with claim_folder(tmp_path / "run") as path:
        assert path == tmp_path / "run.partial" / CHECKPOINT_FILE
        with pytest.raises(RunError, match="another process"), claim_folder(tmp_path / "run"):
            pass
    assert not partial_folder(tmp_path / "run").exists()
    with claim_folder(tmp_path / "run") as path:
        path.touch()
    assert path.exists()
    with claim_folder(tmp_path / "run"):
        pass
