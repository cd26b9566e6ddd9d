"""A model of your own, written in plain torch, becomes a fleet of two devices: train, export, serve, ask.

    python examples/bring_your_own_model.py

On scikit-learn's digits, one expert learns 0 to 4 and the other 5 to 9; a gate learns which one to ask. Alone each
expert is right on half of the digits; together they are right on nearly all.
"""

import argparse
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from nmoe_edge.bundle.fleet import FLEET_FILE, write_fleet
from nmoe_edge.device.node import Node
from nmoe_edge.errors import EdgeError
from nmoe_export.errors import ExportError
from nmoe_export.export import export_fleet
from nmoe_export.source import of_modules

TRAINING_IMAGES = 1400
HALVES = (range(5), range(5, 10))


class Extractor(nn.Module):
    """uint8 images (n, 1, 8, 8) -> latents (n, 32). Any module that returns rows of floats will do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32)
        )

    def forward(self, x):
        return self.layers(x.float() / 255)


def head(outputs):
    """A small network on latents: (n, 32) -> (n, outputs)."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


def trained(net, x, y, steps=400):
    """Train a network as a classifier."""
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def train(x, y):
    """The three parts of a mixture of experts: extractor, gate and experts."""
    extractor = Extractor()
    trained(nn.Sequential(extractor, nn.ReLU(), nn.Linear(32, 10)), x, y)
    with torch.no_grad():
        latents = extractor(x)
    gate = trained(head(2), latents, (y >= 5).long())
    experts = []
    for half in HALVES:
        rows = torch.isin(y, torch.tensor(half))
        experts.append(trained(head(10), latents[rows], y[rows]))
    return extractor, gate, experts


def on_free_ports(fleet):
    """The same fleet at free ports of this machine, in case the exporter's, from 7101 on, are in use."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in fleet.device]
        addresses = [f"tcp://127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    devices = [replace(device, address=address) for device, address in zip(fleet.device, addresses, strict=True)]
    return replace(fleet, device=tuple(devices))


def main(folder):
    """Train, export to this folder, serve both devices, ask both."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads do not help a network of this size
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] * 15).astype(np.uint8)[:, None]  # 0..16 -> 0..240, (1797, 1, 8, 8)
    labels = digits.target[order].astype(np.int64)
    x, y = images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]
    x_test, y_test = images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]

    extractor, gate, experts = train(torch.from_numpy(x), torch.from_numpy(y))
    source = of_modules(extractor, gate, experts, x, labels=y, names=[str(digit) for digit in range(10)])
    fleet = on_free_ports(export_fleet(source, folder).fleet)
    write_fleet(folder / FLEET_FILE, fleet)
    print(f"exported: {', '.join(device.name for device in fleet.device)}")

    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(folder / d.name, folder / FLEET_FILE)) for d in fleet.device]
        while any(peer["state"] != "alive" for node in nodes for peer in node.status()["peers"]):
            time.sleep(0.05)  # the devices are still greeting each other
        for number, node in enumerate(nodes):
            answers = node.infer(x_test, deadline_s=10.0)
            right = (answers.outputs.argmax(1) == y_test).mean()
            by_other = np.mean([row.experts != (number,) for row in answers.rows])
            with torch.no_grad():
                alone = experts[number](extractor(torch.from_numpy(x_test))).argmax(1).numpy()
            print(
                f"device {number}: right on {right:.1%} of {len(x_test)} digits, {by_other:.0%} answered by the other"
                f" device; its own expert alone: {(alone == y_test).mean():.1%}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # only --help
    try:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "fleet")
    except (EdgeError, ExportError) as error:
        sys.exit(str(error))
