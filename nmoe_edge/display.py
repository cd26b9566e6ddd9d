"""Text that the commands print: tables, answers and status lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nmoe_edge.common.text import counted, one_line

if TYPE_CHECKING:
    from nmoe_edge.bundle.fleet import Device, Fleet
    from nmoe_edge.bundle.folder import Bundle
    from nmoe_edge.bundle.selftest import SelfTest, SelfTestResult
    from nmoe_edge.client import Answers
    from nmoe_edge.protocol.messages import RowAnswer
    from nmoe_edge.status import ClassMixReport, StatusReport


def bundle_table(bundle: Bundle) -> str:
    """The manifest's main entries and the files of a verified bundle."""
    manifest = bundle.manifest
    routing, precision = manifest.routing, manifest.precision
    if routing.local_first is None:
        local = "the gate alone decides"
    else:
        local = f"answered locally above confidence {routing.local_first}"
    if routing.familiar is not None:
        local += f" and within distance {routing.familiar:.4g} of what the expert knows"
    labels = ", ".join(bundle.labels) if bundle.labels else "no labels"
    accuracy = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in manifest.accuracy.items())
    facts = {
        "device": f"{manifest.device}, expert {manifest.expert} of {manifest.experts}",
        "bundle": manifest.digest,
        "trunk": manifest.trunk,
        "input": f"{manifest.input.dtype} {list(manifest.input.shape)} {manifest.input.layout}",
        "latent": f"{manifest.latent.dim} numbers, sent as {manifest.latent.dtype}",
        "outputs": f"{manifest.outputs}: {labels}",
        "routing": f"top-{routing.top_k}, {local}, combines {routing.combination}",
        "precision": f"extractor {precision.extractor}, gate {precision.gate}, expert {precision.expert}",
        "target": f"{manifest.target}, opset {manifest.opset}, IR {manifest.ir_version}",
        "accuracy": accuracy or "not measured",
    }
    lines = [f"{key:<10} {value}" for key, value in facts.items()]
    lines += [f"{'':<10} {name:<15} {entry.bytes:>10,} bytes" for name, entry in manifest.files.items()]
    lines.append("verified: every file matches the manifest")
    return "\n".join(lines)


def fleet_table(fleet: Fleet, bundles: dict[str, Bundle]) -> str:
    """The devices of a fleet, and whether each one's verified bundle is in the folder. bundles: by device name."""
    width = max(len(device.name) for device in fleet.device)

    def line(device: Device) -> str:
        keys = "CURVE" if device.public_key else "no key: loopback only"
        missing = "" if device.name in bundles else "  bundle not in this folder"
        return f"{device.name:<{width}}  expert {device.expert:<4} {device.address}  {keys}{missing}"

    lines = [line(device) for device in fleet.device]
    trunk = next(iter(bundles.values())).manifest.trunk
    lines.append(f"verified: {counted(len(bundles), 'bundle')} of one trunk, {trunk}")
    return "\n".join(lines)


def selftest_line(folder: Path, test: SelfTest, result: SelfTestResult) -> str:
    """How a bundle's self-test ended on this machine."""
    return (
        f"{folder}: {'passed' if result.passed else 'FAILED'} on {counted(result.rows, 'input')};"
        f" latents differ by {result.latent_difference:.2g} (allowed {test.latent_tolerance:.2g}),"
        f" outputs by {result.output_difference:.2g} (allowed {test.output_tolerance:.2g});"
        f" the gate chose other experts for {counted(result.other_choices, 'input')}"
    )


def answer_lines(
    path: Path, start: int, rows: int, answers: Answers, facts: StatusReport, as_json: bool
) -> Iterator[str]:
    """One line per answered row of a file.

    start: index of the first of these rows in the file; rows: how many the file has; facts: the device's status.
    """
    width = len(str(rows - 1))
    labels = facts["labels"] or [str(number) for number in range(answers.outputs.shape[1])]
    p = answers.probabilities(facts["combination"], facts["class_mix"]["adapt"])
    ms = answers.elapsed_s * 1000
    for index, (row, shares) in enumerate(zip(answers.rows, p, strict=True), start):
        best = int(shares.argmax())
        if as_json:
            yield json.dumps(
                {
                    "file": str(path),
                    "row": index,
                    "label": labels[best],
                    "confidence": round(float(shares[best]), 6),
                    "experts": dict(zip(map(str, row.experts), row.weights, strict=True)),
                    "missing": row.missing,
                    "degraded": row.degraded,
                    "ms": round(ms, 3),
                }
            )
        else:
            answer = f"{labels[best]}  {shares[best]:.1%}  by {_experts(row)}"
            yield one_line(f"{path}[{index:>{width}}]  {answer}  {ms:.1f} ms")


def _experts(row: RowAnswer) -> str:
    """The experts that answered a row with their weights, and those that did not answer."""
    shares = [f"expert {expert} ({weight:.0%})" for expert, weight in zip(row.experts, row.weights, strict=True)]
    answered = ", ".join(shares) or "no expert"
    if not row.missing:
        return answered
    return f"{answered}; degraded: no answer from expert {', '.join(map(str, row.missing))}"


def status_table(facts: StatusReport) -> str:
    """A device's status report, with a line for each peer."""
    head = {
        "device": f"{facts['device']}, expert {facts['expert']} of {facts['experts']}, at {facts['address']}",
        "version": f"nmoe {facts['version']}, {facts['provider']}, {counted(facts['threads'], 'thread')}",
        "bundle": f"{facts['bundle'][:12]}, trunk {facts['trunk'][:12]}",
        "up": f"{facts['uptime_s']:.0f} s, {counted(facts['under_way'], 'request')} in progress",
        "rules": ", ".join(f"{name} {value}" for name, value in facts["rules"].items()),
        "class mix": _class_mix(facts["class_mix"]),
    }
    lines = [f"{name:<10} {value}" for name, value in head.items()]
    for name, took in facts["took"].items():
        lines.append(f"{'':<10} {name}: {took['count']}, p50 {took['p50_ms']} ms, p99 {took['p99_ms']} ms")
    lines += [f"{'':<10} {name}: {count}" for name, count in facts["counts"].items()]
    if facts["peers"]:
        lines.append(f"{'peer':<14}{'expert':>7}  {'state':<9}{'rtt ms':>8}{'p95 ms':>8}{'asked':>9}{'answered':>9}")
    for peer in facts["peers"]:
        lines.append(
            f"{peer['name']:<14}{peer['expert']:>7}  {peer['state']:<9}{_ms(peer['rtt_ms']):>8}{_ms(peer['p95_ms']):>8}"
            f"{peer['asked']:>9}{peer['answered']:>9}"
        )
    return "\n".join(one_line(line) for line in lines)  # some of it comes from peers, so it may hold control characters


def _class_mix(mix: ClassMixReport) -> str:
    """The state of a device's learned class mix."""
    if not mix["adapt"]:
        return "off"
    return f"{mix['rows']} rows seen, {'in use' if mix['mix'] else 'used from 100 rows on'}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def ready_line(facts: StatusReport) -> str:
    """What a device serves, where and on which provider; facts: its status when it starts."""
    keys = "without keys" if facts["known_keys"] is None else f"CURVE with {counted(facts['known_keys'], 'known key')}"
    where = f"at {facts['address']}, {keys}" if facts["address"] else "in this process only, without an address"
    return (
        f"ready: {facts['device']}, expert {facts['expert']} of {facts['experts']}, {where};"
        f" extractor {facts['extractor']} on {facts['provider']}, {counted(facts['threads'], 'thread')}"
    )
