"""Three devices that really serve, and one that dies: answers over sockets, in one process.

    python examples/three_devices.py FLEET

FLEET is the folder of a fleet whose addresses are on this machine; its first three devices are opened. The first one
is asked its self-test inputs, then again when another is gone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nmoe_edge.bundle import read_bundle
from nmoe_edge.client import Client
from nmoe_edge.errors import EdgeError
from nmoe_edge.fleet import FLEET_FILE, read_fleet
from nmoe_edge.node import Node
from nmoe_edge.origin import Rules


def show(client, inputs):
    """Who answered each row."""
    answers = client.infer(inputs)
    for number, row in enumerate(answers.rows):
        who = ", ".join(
            f"expert {expert} ({weight:.0%})" for expert, weight in zip(row.experts, row.weights, strict=True)
        )
        print(f"  row {number}: by {who}{', degraded' if row.degraded else ''}")
    print(f"  {1000 * answers.elapsed_s:.1f} ms for {len(answers.rows)} rows")


def main(folder):
    """Serve, ask, lose a device, ask again."""
    fleet = read_fleet(folder / FLEET_FILE)
    names = [device.name for device in fleet.device[:3]]
    # Local first is switched off, so that there is something to see.
    nodes = [Node(folder / name, folder / FLEET_FILE, rules=Rules(local_first=1.0)) for name in names]
    try:
        while sum(peer["state"] == "alive" for peer in nodes[0].status()["peers"]) < len(nodes) - 1:
            time.sleep(0.05)
        inputs = read_bundle(folder / names[0]).selftest.inputs
        with Client(nodes[0].address) as client:
            print(f"{', '.join(names)} serve; {names[0]} is asked:")
            show(client, inputs)
            nodes.pop().close()
            print(f"the same without {names[-1]}:")
            show(client, inputs)
    finally:
        for node in nodes:
            node.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FLEET")
    try:
        main(Path(sys.argv[1]))
    except EdgeError as error:
        sys.exit(str(error))
