"""A backbone of your own that cannot be trained is refused in one line, before training starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmoe_train.errors import NetError
from nmoe_train.pipeline import train
from nmoe_train.recipes import configure

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
        (module("(flat, flat)"), "returned tuple, not one tensor"),
        (module("flat.double()"), "torch.float64, not torch.float32"),
        (module("self.layer(flat.float())[0]"), r"returned \(64,\) for 2 images; .* Return one row per image"),
        (module("self.layer(flat.float())[:, :, None]"), r"returned \(2, 64, 1\) .* must return \(2, 64\). Flatten it"),
        (module("self.layer(flat.float())[:, :9]"), r"returned \(2, 9\) .* Set extractor.dim = 9"),
        (module("self.other(flat.float())", "self.other = nn.Linear(64, 64); self.other.weight = self.layer.weight"),
         "two names for one weight"),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_be_trained_is_refused_in_one_line(tmp_path, monkeypatch, source, text):
    monkeypatch.chdir(tmp_path)
    name = f"backbone_{abs(hash(source))}"
    Path(f"{name}.py").write_text(source + "\n")
    with pytest.raises(NetError, match=text):
        train(configure(flags={**SHORT, "extractor": {"backbone": f"{name}:net", "rounds": 1}}), tmp_path / "run")
