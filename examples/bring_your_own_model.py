"""A model that is nobody's here becomes a fleet of two devices: train it, export it, serve it, ask it.

    python examples/bring_your_own_model.py

A small network for scikit-learn's digits, written and trained below in plain torch. One expert learns 0 to 4 alone, the
other 5 to 9; a gate learns which of them to ask. Each alone is right on half of the digits, together on nearly all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from demo.processes import on_free_ports
from sklearn.datasets import load_digits
from torch import nn

from nmoe_edge.bundle.fleet import FLEET_FILE
from nmoe_edge.client import Client
from nmoe_edge.device.node import Node
from nmoe_edge.errors import EdgeError
from nmoe_export.errors import ExportError
from nmoe_export.export import export_fleet
from nmoe_export.source import of_modules

HALVES = (range(5), range(5, 10))


class Extractor(nn.Module):
    """A picture as it comes, uint8 (rows, 1, 8, 8), to 32 numbers. Any module will do that makes rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 1, 8, 8) -> (rows, 32)"""
        return self.layers(x.float() / 255)


def trained(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 400) -> nn.Module:
    """The same network, once it tells these classes apart."""
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def modules(x: torch.Tensor, y: torch.Tensor) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    """Extractor, gate and experts."""
    extractor = Extractor()
    trained(nn.Sequential(extractor, nn.ReLU(), nn.Linear(32, 10)), x, y)
    with torch.no_grad():
        latents = extractor(x)
    gate = trained(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), latents, (y >= 5).long())
    experts = []
    for half in HALVES:
        seen = torch.isin(y, torch.tensor(half))
        experts.append(trained(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)), latents[seen], y[seen]))
    return extractor, gate, experts


def main(folder: Path) -> None:
    """Train, export to this folder, serve, ask."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more gain nothing on a network of this size
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] * 15).astype(np.uint8)[:, None]  # 0..16 -> 0..240, (1797, 1, 8, 8)
    labels = digits.target[order].astype(np.int64)
    shown, asked = slice(0, 1400), slice(1400, None)

    extractor, gate, experts = modules(torch.from_numpy(images[shown]), torch.from_numpy(labels[shown]))
    source = of_modules(
        extractor, gate, experts, images[shown], labels=labels[shown], names=[str(n) for n in range(10)]
    )
    done = export_fleet(source, folder)
    on_free_ports(folder)
    print(f"exported: {', '.join(device.name for device in done.fleet.device)}")

    with ExitStack() as running:
        nodes = [running.enter_context(Node(folder / d.name, folder / FLEET_FILE)) for d in done.fleet.device]
        while any(peer["state"] != "alive" for node in nodes for peer in node.status()["peers"]):
            time.sleep(0.05)  # they are getting to know each other
        for expert, node in enumerate(nodes):
            client = running.enter_context(Client(node.address))
            answers = client.infer(images[asked], deadline_s=10.0)
            right = (answers.outputs.argmax(1) == labels[asked]).mean()
            away = np.mean([row.experts != (expert,) for row in answers.rows])
            with torch.no_grad():
                own = experts[expert](extractor(torch.from_numpy(images[asked]))).argmax(1).numpy()
            print(
                f"device {expert}: right on {right:.1%} of {len(own)} digits, {away:.0%} answered by the other device;"
                f" its own expert alone: {(own == labels[asked]).mean():.1%}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # there are none, but for --help
    try:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "fleet")
    except (EdgeError, ExportError) as error:
        sys.exit(str(error))
