"""Three devices of a fleet serve in this process and answer a client; then one of them stops.

    python examples/quickstart.py FLEET

FLEET is a folder from nmoe-export, such as bundles/digits. Stop its devices first if they are serving on this machine.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.client import Client
from nmoe_edge.device.node import Node
from nmoe_edge.device.rules import Rules
from nmoe_edge.errors import EdgeError, NetworkError
from nmoe_edge.keys import keys_to


def show(answers):
    """Print one line per row: its class, and the experts that answered it."""
    for number, (output, row) in enumerate(zip(answers.outputs, answers.rows, strict=True)):
        experts = ", ".join(f"expert {e} ({w:.0%})" for e, w in zip(row.experts, row.weights, strict=True))
        print(f"  row {number}: output {output.argmax()}, by {experts}{', degraded' if row.degraded else ''}")


def main(folder):
    """Serve three devices, ask the first, stop the third, ask again."""
    fleet_file = folder / FLEET_FILE
    devices = read_fleet(fleet_file).device[:3]
    first, last = devices[0], devices[-1]
    inputs = read_bundle(folder / first.name).selftest.inputs  # any array (rows, …) of the right shape and dtype
    rules = Rules(local_first=1.0)  # the gate alone decides, so that rows go to other devices
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(folder / device.name, fleet_file, rules=rules)) for device in devices]
        client = stack.enter_context(Client(first.address, *keys_to(first.name, fleet_file, None)))
        while sum(peer["state"] == "alive" for peer in client.status()["peers"]) < len(nodes) - 1:
            time.sleep(0.05)  # the devices are still greeting each other

        print(f"{', '.join(device.name for device in devices)} serve; {first.name} is asked:")
        show(client.infer(inputs))
        nodes[-1].close()
        print(f"the same without {last.name}:")
        show(client.infer(inputs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", metavar="FLEET", type=Path)
    try:
        main(parser.parse_args().fleet)
    except NetworkError as error:
        sys.exit(f"{error} (this example serves the devices itself: stop the ones that are serving already)")
    except EdgeError as error:
        sys.exit(str(error))
