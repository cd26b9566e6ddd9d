"""Puts the status report of a device together from its parts."""

from __future__ import annotations

from nmoe_edge import __version__
from nmoe_edge.common.schema import to_plain
from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.peers import Peers
from nmoe_edge.device.requests import Requests
from nmoe_edge.device.rules import ResolvedRules
from nmoe_edge.device.sockets import Sockets
from nmoe_edge.models import Models
from nmoe_edge.protocol.classmix import ClassMix
from nmoe_edge.status import ClassMixReport, RulesReport, StatusReport


def status_report(
    models: Models,
    requests: Requests,
    peers: Peers,
    sockets: Sockets,
    metrics: Metrics,
    threads: int,
    uptime_s: float,
) -> StatusReport:
    """The status report at this moment; called in the node's thread."""
    manifest = models.manifest
    return {
        "device": manifest.device,
        "expert": manifest.expert,
        "experts": manifest.experts,
        "address": sockets.address,
        "bundle": manifest.digest,
        "trunk": manifest.trunk,
        "provider": models.provider,
        "threads": threads,
        "extractor": manifest.precision.extractor,
        "known_keys": sockets.known_keys if sockets.has_keys else None,
        "uptime_s": round(uptime_s, 1),
        "under_way": len(requests.open),
        "version": __version__,
        "input": to_plain(manifest.input),
        "combination": manifest.routing.combination,
        "labels": list(models.labels or ()),
        "rules": _rules_report(requests.rules),
        "class_mix": _class_mix_report(requests.mix, requests.rules),
        "peers": peers.report(),
        "counts": metrics.counts_report(),
        "took": metrics.durations_report(),
    }


def _rules_report(rules: ResolvedRules) -> RulesReport:
    return {
        "top_k": rules.top_k,
        "local_first": rules.local_first,
        "familiar": rules.familiar,
        "latents": rules.latents,
        "deadline_s": rules.deadline_s,
        "prefer_near": rules.prefer_near,
        "hedge": rules.hedge,
    }


def _class_mix_report(class_mix: ClassMix, rules: ResolvedRules) -> ClassMixReport:
    mix = class_mix.mix
    return {
        "adapt": rules.adapt,
        "rows": class_mix.rows,
        "mix": None if mix is None else [round(share, 4) for share in mix.tolist()],
    }
