"""Small torch modules with the building blocks of a ResNet, as a user might bring them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nmoe_export.export import Options

INT8 = Options("int8", max_drop=100.0)


class Block(nn.Module):
    """A convolution with BatchNorm, a residual convolution and a pool."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.one(x.float() / 255)).relu()
        return (x + self.two(x)).relu().mean((2, 3))


class Attentive(nn.Module):
    """Causal attention: its mask is minus infinity."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x):
        h = self.embed(x)
        scores = h @ h.transpose(1, 2) / 8**0.5 + self.mask
        return self.out((scores.softmax(2) @ h).mean(1))


def pictures():
    """Images of different brightness, uint8 (80, 3, 8, 8)."""
    draw = np.random.default_rng(0)
    return (draw.integers(0, 256, (80, 3, 8, 8)) * draw.uniform(size=(80, 3, 1, 1)) ** 2).astype(np.uint8)


def modules(seed=0, experts=3, gates=1):
    """Extractor, gates and experts. Biases are chosen so that answers differ between the pictures."""
    torch.manual_seed(seed)
    extractor = Block().eval()
    nets = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(experts)]
    gate = [nn.Linear(8, experts) for _ in range(gates)]
    with torch.no_grad():
        h = extractor(torch.from_numpy(pictures()))
        for net in (*nets, *gate):
            last = net[-1] if isinstance(net, nn.Sequential) else net
            last.bias -= net(h).mean(0)
    return extractor, gate[0] if gates == 1 else gate, nets
