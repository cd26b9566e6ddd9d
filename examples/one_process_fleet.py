"""A whole fleet in one process: what travels between devices, without the sockets.

    python examples/one_process_fleet.py FLEET

Every device of the fleet folder FLEET is opened. The first one takes its self-test inputs, makes latents of them, asks
the experts that its gate picks through real frames, and combines what comes back. Then the same again with the expert
silent that was asked most. Local-first is left out, so that there is something to see.
"""

from __future__ import annotations

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
"""Numbers of requests, never used twice: not even after a restart."""


def peer(models, frames):
    """What a device does with an Ask, frames in and frames out."""
    ask = decode(frames)
    outputs = models.expert(ask.latents.unpack())
    return encode(Answer(ask.request, ask.expert, 0, Tensor.pack(outputs, "float32")))


def answer(bundles, inputs, silent=()):
    """The first device's answer to its inputs; the experts in `silent` get every Ask and say nothing."""
    manifest = next(iter(bundles.values())).manifest
    models = {bundle.manifest.expert: Models(bundle) for bundle in bundles.values()}
    own, routing = manifest.expert, manifest.routing

    latents = models[own].extractor(inputs)
    found = route(models[own].gate(latents), own, models, routing.top_k)
    it = Exchange(found, manifest.outputs, REQUESTS, deadline=DEADLINE_S, combination=routing.combination)

    now, sent_bytes = 0.0, 0
    to_do = it.start(now)
    while not it.done:
        if not to_do:
            now = it.wake_at  # nobody else will say anything: time passes
            to_do = it.tick(now)
        action = to_do.pop(0)
        if not isinstance(action, Call):
            continue
        rows = latents[list(action.rows)]
        if action.expert == own:
            to_do += it.answered(action.request, own, models[own].expert(rows), now)
            continue
        packed = Tensor.pack(rows, manifest.latent.dtype)
        frames = encode(Ask(action.request, 0, int(DEADLINE_S * 1000), action.expert, manifest.trunk_bytes, packed))
        sent_bytes += sum(map(len, frames))
        if action.expert not in silent:
            reply = decode(peer(models[action.expert], frames))
            to_do += it.answered(reply.request, reply.expert, reply.outputs.unpack(), now)
    return *it.result(), sent_bytes


def show(bundles, outputs, rows, sent_bytes):
    """One line a row: its label, who answered, who was missing."""
    labels = next(iter(bundles.values())).labels or range(outputs.shape[1])
    for output, row in zip(outputs, rows, strict=True):
        experts = ", ".join(f"expert {e} (weight {w:.2f})" for e, w in zip(row.experts, row.weights, strict=True))
        missing = f"; degraded, expert {', '.join(map(str, row.missing))} is missing" if row.degraded else ""
        print(f"  {labels[output.argmax()]:<8} answered by {experts}{missing}")
    print(f"  {sent_bytes} bytes of latents travelled")


def main(folder):
    """Show the fleet answering, whole and with a silent expert."""
    _, bundles = read_fleet_folder(folder)
    first = next(iter(bundles.values()))
    inputs = first.selftest.inputs
    print(
        f"{len(bundles)} devices; {first.manifest.device} asks, and answers nothing at home that its gate sends away:"
    )
    outputs, rows, sent_bytes = answer(bundles, inputs)
    show(bundles, outputs, rows, sent_bytes)

    asked = Counter(expert for row in rows for expert in row.experts if expert != first.manifest.expert)
    if not asked:
        return
    silent = max(asked, key=asked.get)
    print(f"the same with a silent expert {silent}:")
    show(bundles, *answer(bundles, inputs, {silent}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", metavar="FLEET")
    try:
        main(parser.parse_args().fleet)
    except EdgeError as error:
        sys.exit(str(error))
