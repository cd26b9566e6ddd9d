"""Three devices of a fleet on this machine, asked from Python; then one of them goes.

    python examples/quickstart.py FLEET

FLEET is a folder that nmoe-export wrote, such as bundles/digits; its addresses are on this machine. The devices are
served by this very process: end those that serve there already.
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


def main(folder):
    """Serve, ask, lose a device, ask again."""
    path = folder / FLEET_FILE
    first, *_ = devices = read_fleet(path).device[:3]
    names = [device.name for device in devices]
    rows = read_bundle(folder / names[0]).selftest.inputs  # any array of inputs would do
    away = Rules(local_first=1.0)  # let the gate alone decide, so that there is something to see
    with ExitStack() as running:
        nodes = [running.enter_context(Node(folder / name, path, rules=away)) for name in names]
        client = running.enter_context(Client(first.address, *keys_to(first.name, path, None)))
        while sum(peer["state"] == "alive" for peer in client.status()["peers"]) < len(nodes) - 1:
            time.sleep(0.05)  # they are getting to know each other
        for told in (f"{', '.join(names)} serve; {names[0]} is asked:", f"the same without {names[-1]}:"):
            print(told)
            answers = client.infer(rows)
            for number, (output, row) in enumerate(zip(answers.outputs, answers.rows, strict=True)):
                who = ", ".join(f"expert {e} ({w:.0%})" for e, w in zip(row.experts, row.weights, strict=True))
                print(f"  row {number}: output {output.argmax()}, by {who}{', degraded' if row.degraded else ''}")
            nodes[-1].close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", metavar="FLEET", type=Path)
    try:
        main(parser.parse_args().fleet)
    except NetworkError as error:
        sys.exit(f"{error} (this example serves the devices by itself)")
    except EdgeError as error:
        sys.exit(str(error))
