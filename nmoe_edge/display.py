"""What commands show to people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nmoe_edge.common.text import counted, one_line

if TYPE_CHECKING:
    from nmoe_edge.bundle.fleet import Fleet
    from nmoe_edge.bundle.folder import Bundle
    from nmoe_edge.client import Answers
    from nmoe_edge.status import StatusReport


def bundle_table(bundle: Bundle) -> str:
    """What a bundle says of itself."""
    manifest = bundle.manifest
    routing, precision = manifest.routing, manifest.precision
    at_home = (
        "the gate alone decides" if routing.local_first is None else f"at home when surer than {routing.local_first}"
    )
    names = ", ".join(bundle.labels) if bundle.labels else "no labels"
    facts = {
        "device": f"{manifest.device}, expert {manifest.expert} of {manifest.experts}",
        "bundle": manifest.digest,
        "trunk": manifest.trunk,
        "input": f"{manifest.input.dtype} {list(manifest.input.shape)} {manifest.input.layout}",
        "latent": f"{manifest.latent.dim} numbers, {manifest.latent.dtype} on the wire",
        "outputs": f"{manifest.outputs}: {names}",
        "routing": f"top-{routing.top_k}, {at_home}, {routing.combination} are combined",
        "precision": f"extractor {precision.extractor}, gate {precision.gate}, expert {precision.expert}",
        "target": f"{manifest.target}, opset {manifest.opset}, IR {manifest.ir_version}",
        "accuracy": ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in manifest.accuracy.items())
        or "not measured",
    }
    lines = [f"{key:<10} {value}" for key, value in facts.items()]
    lines += [f"{'':<10} {name:<15} {entry.bytes:>10,} bytes" for name, entry in manifest.files.items()]
    return "\n".join([*lines, "verified: every file is as its manifest says"])


def fleet_table(fleet: Fleet, bundles: dict[str, Bundle]) -> str:
    """Who the devices are, and which bundles are here."""
    width = max(len(device.name) for device in fleet.device)
    lines = [
        f"{device.name:<{width}}  expert {device.expert:<4} {device.address}"
        f"  {'CURVE' if device.public_key else 'no key: loopback only'}"
        f"{'' if device.name in bundles else '  not here'}"
        for device in fleet.device
    ]
    trunk = next(iter(bundles.values())).manifest.trunk
    return "\n".join([*lines, f"verified: {counted(len(bundles), 'bundle')} of one trunk, {trunk}"])


def answer_lines(
    path: Path, start: int, rows: int, answers: Answers, facts: StatusReport, as_json: bool
) -> Iterator[str]:
    """A line for each row, the first of which is `start` of the `rows` of its file; facts: the device's status."""
    width = len(str(rows - 1))
    labels = facts["labels"] or [str(number) for number in range(answers.outputs.shape[1])]
    p = answers.probabilities(facts["combination"], facts["class_mix"]["adapt"])
    for i, (row, shares) in enumerate(zip(answers.rows, p, strict=True)):
        best, ms = int(shares.argmax()), answers.elapsed_s * 1000
        if as_json:
            yield json.dumps(
                {
                    "file": str(path),
                    "row": start + i,
                    "label": labels[best],
                    "confidence": round(float(shares[best]), 6),
                    "experts": dict(zip(map(str, row.experts), row.weights, strict=True)),
                    "missing": row.missing,
                    "degraded": row.degraded,
                    "ms": round(ms, 3),
                }
            )
            continue
        who = ", ".join(f"expert {e} ({w:.0%})" for e, w in zip(row.experts, row.weights, strict=True)) or "nobody"
        missing = f"; degraded: without expert {', '.join(map(str, row.missing))}" if row.missing else ""
        yield one_line(
            f"{path}[{start + i:>{width}}]  {labels[best]}  {shares[best]:.1%}  by {who}{missing}  {ms:.1f} ms"
        )


def status_table(facts: StatusReport) -> str:
    """A device's status."""
    mix, rules = facts["class_mix"], facts["rules"]
    learnt = f"{mix['rows']} rows seen, " + ("in use" if mix["mix"] else "200 are needed") if mix["adapt"] else "off"
    head = {
        "device": f"{facts['device']}, expert {facts['expert']} of {facts['experts']}, at {facts['address']}",
        "version": f"nmoe {facts['version']}, {facts['provider']}, {counted(facts['threads'], 'thread')}",
        "bundle": f"{facts['bundle'][:12]}, trunk {facts['trunk'][:12]}",
        "up": f"{facts['uptime_s']:.0f} s, {facts['under_way']} requests under way",
        "rules": ", ".join(f"{name} {value}" for name, value in rules.items()),
        "class mix": learnt,
    }
    lines = [f"{name:<10} {value}" for name, value in head.items()]
    for name, took in facts["took"].items():
        lines.append(f"{'':<10} {name}: {took['count']}, p50 {took['p50_ms']} ms, p99 {took['p99_ms']} ms")
    lines += [f"{'':<10} {name}: {count}" for name, count in facts["counts"].items()]
    if facts["peers"]:
        lines.append(f"{'peer':<14}{'expert':>7}  {'state':<9}{'rtt ms':>8}{'p95 ms':>8}{'asked':>9}{'answered':>9}")
    for peer in facts["peers"]:
        rtt, p95 = ("–" if ms is None else f"{ms:.2f}" for ms in (peer["rtt_ms"], peer["p95_ms"]))
        lines.append(
            f"{peer['name']:<14}{peer['expert']:>7}  {peer['state']:<9}{rtt:>8}{p95:>8}"
            f"{peer['asked']:>9}{peer['answered']:>9}"
        )
    return "\n".join(one_line(line) for line in lines)  # a peer's words may be in it


def ready_line(facts: StatusReport) -> str:
    """What a device serves, and how, when it begins to."""
    keys = "without keys" if facts["known_keys"] is None else f"CURVE with {counted(facts['known_keys'], 'known key')}"
    where = f"at {facts['address']}, {keys}" if facts["address"] else "for nobody but this process"
    return (
        f"ready: {facts['device']}, expert {facts['expert']} of {facts['experts']}, {where};"
        f" extractor {facts['extractor']} on {facts['provider']}, {counted(facts['threads'], 'thread')}"
    )
