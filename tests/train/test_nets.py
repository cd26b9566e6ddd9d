"""Backbones of somebody's own: what is refused, each in one line, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmoe_train.config import configure
from nmoe_train.errors import NetError
from nmoe_train.pipeline import train

SHORT = {"extractor": {"rounds": 2}, "gate": {"rounds": 3, "laps": 1}, "experts": {"epochs": 2}, "data": {"clients": 3}}

MODULE = """
import torch
from torch import nn
class net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        {more}
    def forward(self, x):
        flat = x.flatten(1)
        return {answer}
"""


def module(answer, more=""):
    return MODULE.format(answer=answer, more=more)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def net():\n    return 3", "returned int, not a torch"),
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError"),
        ("def net(:", "cannot be imported: SyntaxError"),
        ("def net():\n    raise KeyError('x')", "cannot be built with {}: KeyError: 'x'"),
        (module("self.layer(flat)"), "fails on two uint8 images"),
        (module("flat"), "torch.uint8, not torch.float32"),
        (module("(flat, flat)"), "returns tuple, not one tensor"),
        (module("flat.double()"), "torch.float64, not torch.float32"),
        (module("self.layer(flat.float())[0]"), r"\[64\] of two images, not \[2, 64\]"),
        (module("self.other(flat.float())", "self.other = nn.Linear(64, 64); self.other.weight = self.layer.weight"),
         "two names for one weight"),
    ],
)  # fmt: skip
def test_backbones_that_cannot_be_trained_are_one_line(tmp_path, monkeypatch, source, text):
    monkeypatch.chdir(tmp_path)
    name = f"backbone_{abs(hash(source))}"
    Path(f"{name}.py").write_text(source + "\n")
    with pytest.raises(NetError, match=text):
        train(configure(flags={**SHORT, "extractor": {"backbone": f"{name}:net", "rounds": 1}}), tmp_path / "run")
