"""A whole fleet in one process, without sockets: every message is encoded, decoded and counted.

    python examples/one_process_fleet.py FLEET

The first device of FLEET answers its self-test inputs with the experts that its gate picks, its own or another's. Then
it does so again while the busiest peer stays silent.
"""

import argparse
import itertools
import secrets
import sys
from collections import Counter

from nmoe_edge.bundle.fleet import read_fleet_folder
from nmoe_edge.errors import EdgeError
from nmoe_edge.models import Models
from nmoe_edge.protocol.exchange import Call, Exchange
from nmoe_edge.protocol.messages import Answer, Ask
from nmoe_edge.protocol.routing import route
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import decode, encode

DEADLINE_S = 0.1
REQUESTS = itertools.count(secrets.randbits(60))
"""Request numbers. They start at random, so that no device reuses one after a restart."""


def peer(models, frames):
    """What a peer does with an Ask: frames in, frames out."""
    ask = decode(frames)
    outputs = models.expert(ask.latents.unpack())
    return encode(Answer(ask.request, ask.expert, 0, Tensor.pack(outputs, "float32")))


def answer(bundles, inputs, silent=()):
    """The first device's outputs for its inputs, how each row was answered, and the bytes sent.

    bundles: name -> bundle; silent: experts that receive every Ask and never reply
    """
    manifest = next(iter(bundles.values())).manifest
    models = {bundle.manifest.expert: Models(bundle) for bundle in bundles.values()}
    own, routing = manifest.expert, manifest.routing

    latents = models[own].extractor(inputs)
    found = route(models[own].gate(latents), own, models, routing.top_k)
    exchange = Exchange(found, manifest.outputs, REQUESTS, deadline=DEADLINE_S, combination=routing.combination)

    now = 0.0
    sent_bytes = 0
    actions = exchange.start(now)
    while not exchange.done:
        if not actions:
            now = exchange.wake_at  # no reply is on its way: skip to the next moment that matters
            actions = exchange.tick(now)
        action = actions.pop(0)
        if not isinstance(action, Call):
            continue  # a Fault: a device would tell its breaker
        rows = latents[list(action.rows)]
        if action.expert == own:
            actions += exchange.answered(action.request, own, models[own].expert(rows), now)
            continue
        packed = Tensor.pack(rows, manifest.latent.dtype)
        frames = encode(Ask(action.request, 0, int(DEADLINE_S * 1000), action.expert, manifest.trunk_bytes, packed))
        sent_bytes += sum(len(frame) for frame in frames)
        if action.expert not in silent:
            reply = decode(peer(models[action.expert], frames))
            actions += exchange.answered(reply.request, reply.expert, reply.outputs.unpack(), now)
    return *exchange.result(), sent_bytes


def show(bundles, outputs, rows, sent_bytes):
    """Print one line per row: its label, the experts that answered, those that were missing."""
    labels = next(iter(bundles.values())).labels or range(outputs.shape[1])
    for output, row in zip(outputs, rows, strict=True):
        experts = ", ".join(f"expert {e} (weight {w:.2f})" for e, w in zip(row.experts, row.weights, strict=True))
        missing = f"; degraded, expert {', '.join(map(str, row.missing))} is missing" if row.degraded else ""
        print(f"  {labels[output.argmax()]:<8} answered by {experts}{missing}")
    print(f"  {sent_bytes} bytes sent to other devices")


def main(folder):
    """Show the fleet's answers, complete and with one expert silent."""
    _, bundles = read_fleet_folder(folder)
    first = next(iter(bundles.values()))
    inputs = first.selftest.inputs
    print(f"{len(bundles)} devices; {first.manifest.device} asks the experts that its gate picks:")
    outputs, rows, sent_bytes = answer(bundles, inputs)
    show(bundles, outputs, rows, sent_bytes)

    asked = Counter(expert for row in rows for expert in row.experts if expert != first.manifest.expert)
    if not asked:
        return
    silent = max(asked, key=asked.get)
    print(f"the same while expert {silent} is silent:")
    show(bundles, *answer(bundles, inputs, {silent}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", metavar="FLEET")
    try:
        main(parser.parse_args().fleet)
    except EdgeError as error:
        sys.exit(str(error))
