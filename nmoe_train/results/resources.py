"""What a training computes and sends, per stage and client. The figures follow from settings, networks and history, so
they are the same on every machine; meter.py measures what depends on the machine.

Multiply-adds are those of the networks' convolutions and matrix products, counted once per network with one pass
forward and one backward. Norms, activations, optimisers, image changes and FedSC's products z zᵀ are left out. A client
also pays for frozen networks: the extractor for the latents of stages 2 and 3, the experts for a trained gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nmoe_train.config import Config, ExtractorConfig
from nmoe_train.meter import Usage
from nmoe_train.nets import NetSpec, build
from nmoe_train.run import Networks
from nmoe_train.stages.extractor import Headed
from nmoe_train.stages.federation import active_clients, size_bytes
from nmoe_train.stages.gate import client_at

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one network for one row."""

    forward: int
    backward: int

    @property
    def training(self) -> int:
        return self.forward + self.backward


def resources_of(
    config: Config, networks: Networks, shape: Sequence[int], sizes: Sequence[int], history: History
) -> dict[str, Any]:
    """`networks`, `stages` and `fedavg` of metrics.json's `resources`; RUN.md explains the keys.

    shape: (C, H, W) of an image; sizes: training samples of each client; history: as in metrics.json
    """
    classes = int(networks.expert.arguments["outputs"])
    work = _work_of(config, networks, shape, classes)
    stages = {
        "extractor": _Stage(
            _extractor_work(config, work, sizes, history), _shares(config, "extractor", sizes, history)
        ),
        "experts": _Stage(_experts_work(config, work, sizes), _shares(config, "experts", sizes, history)),
        "gate": _Stage(_gate_work(config, work, sizes, history), _shares(config, "gate", sizes, history)),
    }
    return {
        "networks": {name: {"forward": w.forward, "backward": w.backward} for name, w in work.items()},
        "stages": {name: stage.as_json() for name, stage in stages.items()},
        "fedavg": _fedavg(config, networks, classes, len(sizes)),
    }


def client_seconds(stages: Mapping[str, Any], measured: Usage) -> dict[str, list[float]]:
    """Seconds of each client by stage: clients share one process, so a stage's time is divided by multiply-adds."""
    seconds = {}
    for name, stage in stages.items():
        per_second = stage["multiply_adds"] / max(measured.get(name, {}).get("seconds", 0.0), 1e-9)
        seconds[name] = [work / per_second if per_second else 0.0 for work in stage["clients"]["multiply_adds"]]
    return seconds


@dataclass(frozen=True, slots=True)
class _Stage:
    multiply_adds: Sequence[int]
    """Of each client"""
    sent: tuple[Sequence[int], Sequence[int]]
    """Bytes that each client sent, and those that it received"""

    def as_json(self) -> dict[str, Any]:
        up, down = self.sent
        clients = {"multiply_adds": list(self.multiply_adds), "up": list(up), "down": list(down)}
        return {**{key: sum(values) for key, values in clients.items()}, "clients": clients}


def multiply_adds(net: nn.Module, rows: Tensor) -> Work:
    """Multiply-adds of a network for one of these rows (two or more), counted by passing them through it."""
    trained = [p for p in net.parameters() if p.requires_grad]
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        total = net(rows).float().sum()
        forward = counter.get_total_flops()
        if trained and total.requires_grad:
            torch.autograd.grad(total, trained, allow_unused=True)
    both = counter.get_total_flops()
    return Work(forward // (2 * len(rows)), (both - forward) // (2 * len(rows)))


def _work_of(config: Config, networks: Networks, shape: Sequence[int], classes: int) -> dict[str, Work]:
    """`classifier` is what stage 1 trains, the extractor with its head or projector; `extractor` is without it."""
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    latents = torch.zeros(2, config.extractor.dim)
    with torch.random.fork_rng():  # new networks draw weights
        extractor = build(networks.extractor)
        return {
            "classifier": multiply_adds(Headed(extractor, build(config.head_net(classes))), images),
            "extractor": multiply_adds(extractor, images),
            "expert": multiply_adds(build(networks.expert), latents),
            "gate": multiply_adds(build(networks.gate), latents),
        }


def rows_trained(samples: int, config: ExtractorConfig) -> int:
    """Rows of a client in one round of stage 1: its samples in every local epoch, up to the step limit."""
    full, rest = divmod(samples, config.batch)
    batches = [config.batch] * full + [rest] * (rest > 0)
    if rest == 1 and full:  # a last batch of one row joins the batch before it
        batches[-2:] = [config.batch + 1]
    steps = len(batches) * config.local_epochs
    taken = steps if config.step_limit is None else min(steps, config.step_limit)
    epochs, more = divmod(taken, len(batches))
    return epochs * samples + sum(batches[:more])


def _extractor_work(config: Config, work: Mapping[str, Work], sizes: Sequence[int], history: History) -> list[int]:
    rows = [rows_trained(n, config.extractor) for n in sizes]
    per_round = [r * work["classifier"].training for r in rows]
    if config.extractor.method == "fedsc":  # two views of every image, and the released matrix
        views = config.fedsc.matrix_views
        per_round = [2 * w + views * n * work["classifier"].forward for w, n in zip(per_round, sizes, strict=True)]
    total = [0] * len(sizes)
    for active, _ in _participants(config, "extractor", len(sizes), history):
        for client in active:
            total[client] += per_round[client]
    return total


def _experts_work(config: Config, work: Mapping[str, Work], sizes: Sequence[int]) -> list[int]:
    """Every client takes as many steps as the largest one."""
    steps = max(-(-n // config.experts.batch) for n in sizes)
    rows = config.experts.epochs * steps * config.experts.batch
    return [n * work["extractor"].forward + rows * work["expert"].training for n in sizes]


def _gate_work(config: Config, work: Mapping[str, Work], sizes: Sequence[int], history: History) -> list[int]:
    method = config.gate.method
    if method == "rangate":
        return [0] * len(sizes)
    if method == "statgate":  # second moments of the latents
        return [n * (work["extractor"].forward + config.extractor.dim**2) for n in sizes]
    total = [n * (work["extractor"].forward + len(sizes) * work["expert"].forward) for n in sizes]
    for active, _ in _participants(config, "gate", len(sizes), history):
        for client in active:
            rows = sizes[client] if method == "rollgate" else config.gate.local_steps * config.gate.batch
            total[client] += rows * work["gate"].training
    return total


Participants = list[tuple[Sequence[int], Sequence[int]]]


def _participants(config: Config, stage: str, clients: int, history: History) -> Participants:
    """For every round of a stage the clients that finished it, and those that dropped out."""
    rounds = [entry["round"] - 1 for entry in history if entry["stage"] == stage]
    everyone = stage == "experts" or (stage == "gate" and config.gate.method == "statgate")
    if everyone:
        return [(range(clients), ()) for _ in rounds]
    if stage == "gate" and config.gate.method == "rollgate":
        return [((client_at(stop, clients, config.seed, config.gate),), ()) for stop in rounds]
    section = config.gate if stage == "gate" else config.extractor
    return [active_clients(clients, section.share, section.drop, config.seed, stage, round_) for round_ in rounds]


def _shares(config: Config, stage: str, sizes: Sequence[int], history: History) -> tuple[Sequence[int], Sequence[int]]:
    """Bytes that each client sent and received: a round's bytes, divided equally among its clients."""
    up = [0] * len(sizes)
    down = [0] * len(sizes)
    entries = [entry for entry in history if entry["stage"] == stage]
    for entry, (active, dropped) in zip(entries, _participants(config, stage, len(sizes), history), strict=True):
        scheduled = (*active, *dropped)
        for client in active:
            up[client] += entry["up"] // len(active)
        for client in scheduled:
            down[client] += entry["down"] // len(scheduled)
    return up, down


def _fedavg(config: Config, networks: Networks, classes: int, clients: int) -> dict[str, int]:
    """Bytes of FedAvg with the same extractor and an expert (or FedCE's head) on it, for as many rounds as stage 1."""
    head: NetSpec = networks.head or config.expert_net(classes)
    with torch.random.fork_rng():
        payload = size_bytes(Headed(build(networks.extractor), build(head)).state_dict())
    scheduled = max(1, round(config.extractor.share * clients))
    total = config.extractor.rounds * scheduled * payload
    return {"up": total, "down": total}
