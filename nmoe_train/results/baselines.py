"""What a run is to be compared with, on the same split and with as many epochs as its FedCE had, nobody absent.

local        every client trains a whole classifier on its own samples, and nobody averages
fedavg       FedCE's one classifier for all, which is this run's own stage 1 where that was FedCE
centralised  all samples in one place: extractor, experts and gate of the same shapes, trained as a plain mixture
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nmoe_edge.common.schema import parse_json
from nmoe_train.checkpoint import Checkpoint, claimed
from nmoe_train.config import ExtractorConfig, configure
from nmoe_train.errors import RunError
from nmoe_train.nets import build
from nmoe_train.pipeline import fleet_of, surroundings
from nmoe_train.results.evaluation import DeviceRows, adapted, answers, measure
from nmoe_train.results.pages.run_page import page
from nmoe_train.run import Inference, Run, write_beside
from nmoe_train.stages.extractor import Headed, fedce_round, fedce_update
from nmoe_train.stages.federation import Round, State, Update, check, cosine, generator, report
from nmoe_train.stages.losses import load_loss, mixture_loss
from nmoe_train.trainer import Progress, Trainer, encoded, moved

METHODS = ("local", "fedavg", "centralised")
FILE = "baselines.json"
RATE = 2e-3
"""Of the centralised mixture's experts, which start fresh."""
SPREAD = 0.01
"""Weight of the centralised mixture's load loss: without it one expert takes all."""


def baselines(run: Run, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Train and measure what is not there yet; baselines.json and report.html of the run are written after each."""
    place = run.folder.with_name(f"{run.folder.name}-baselines")
    with claimed(place) as path, surroundings(run.record.config.get("threads", 1)):
        fleet, _ = fleet_of(run)
        found = measured(run)
        for name in METHODS:
            if name not in found:
                found[name] = _measure(fleet, run, name, lambda c: c.write(path), _begun(path, run, name), progress)
                write_beside(run, FILE, json.dumps(found, indent=2, allow_nan=False) + "\n")
                path.unlink(missing_ok=True)
        text = page(run.folder.name, run.record.config, run.metrics, run.record.labels or (), by_part(found))
        write_beside(run, "report.html", text)
        return found


def measured(run: Run) -> dict[str, Any]:
    """What baselines.json holds so far, by method."""
    path = run.folder / FILE
    try:
        plain = parse_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; remove it to measure again") from error
    if not isinstance(plain, dict):
        raise RunError(f"{path}: not a JSON object; remove it to measure again")
    return plain


def by_part(found: dict[str, Any]) -> dict[str, Any]:
    """The same, own and balanced test apart, as metrics.json has it."""
    return {part: {name: figures[part] for name, figures in found.items()} for part in ("own", "iid")}


def _begun(path: Path, run: Run, name: str) -> Checkpoint:
    """Where this baseline stopped, or its beginning."""
    first = Checkpoint(dict(run.record.config), name, fingerprint=run.record.data.fingerprint)
    c = Checkpoint.read(path) if path.exists() else first
    return c if (c.config, c.stage, c.fingerprint) == (first.config, name, first.fingerprint) else first


def _measure(
    fleet: Trainer, run: Run, name: str, save: Callable[[Checkpoint], None], c: Checkpoint, progress: Progress
) -> dict[str, Any]:
    config = _settings(fleet)
    torch.manual_seed(fleet.config.seed)
    head = fleet.networks.head or fleet.config.expert_net(fleet.classes)
    net = Headed(build(fleet.networks.extractor), build(head)).to(fleet.device)
    data = [(x.to(fleet.device), y.to(fleet.device)) for x, y in fleet.clients.train]
    if name == "centralised":
        data = [tuple(torch.cat(column) for column in zip(*data, strict=True))]
    if name == "fedavg" and run.record.networks.head is not None and fleet.config.extractor.heads == "shared":
        return {part: run.metrics[part]["fedce"] for part in ("own", "iid")}
    step = _alone_round if name == "local" else fedce_round
    first = {key: value.detach().clone() for key, value in net.state_dict().items()}
    states = moved(c.states.get(name, [first] * len(data)), fleet.device)
    for round_ in range(c.round, config.rounds):
        states, told = step(net, states, data, round_, fleet.config.seed, config)
        save(replace(c, round=round_ + 1, states={name: states}))
        progress(replace(told, stage=name))
    if name == "centralised":
        return _mixture(fleet, net, states[0], data[0], progress)
    # A classifier of one client carries that client's class mix already.
    rules = replace(run.record.inference, adapt=run.record.inference.adapt and name == "fedavg")
    said: dict[str, list[Tensor]] = {"own": [], "iid": []}
    for part, parts, _ in _tests(fleet):
        for i, (x, _) in parts:
            net.load_state_dict(states[i])
            said[part].append(adapted(encoded(net, x).softmax(1), rules))
    return {part: measure(said[part], y) for part, _, y in _tests(fleet)}


def _settings(fleet: Trainer) -> ExtractorConfig:
    """Those of the run's FedCE, with nobody absent; where its stage 1 was none, the defaults for its data."""
    config = fleet.config.extractor
    if config.method != "fedce":
        usual = configure(flags={"data": {"name": fleet.config.data.name}}).extractor
        config = replace(usual, backbone=config.backbone, arguments=config.arguments, dim=config.dim)
    return replace(config, heads="shared", share=1.0, drop=0.0, step_limit=None)


def _tests(fleet: Trainer) -> list[tuple[str, list[tuple[int, Any]], list[Tensor]]]:
    """(name, each device's number and test set, its labels)"""
    sets = (("own", fleet.clients.own_test), ("iid", [fleet.clients.test] * fleet.count))
    return [(name, list(enumerate(parts)), [y for _, y in parts]) for name, parts in sets]


def _alone_round(
    net: nn.Module,
    states: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor]],
    round_: int,
    seed: int,
    config: ExtractorConfig,
) -> tuple[list[State], Round]:
    """A round of FedCE of which nobody tells anybody."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    updates = [
        fedce_update(net, states[i], i, *data[i], rate, config, generator(seed, "extractor", round_, i))
        for i in range(len(data))
    ]
    check("extractor", round_, updates)
    return [update.state for update in updates], report("local", round_, config.rounds, updates)


def _mixture(
    fleet: Trainer, net: Headed, state: State, data: tuple[Tensor, Tensor], progress: Progress
) -> dict[str, Any]:
    """Experts and gate trained together on everybody's latents."""
    config, seed, n = fleet.config, fleet.config.seed, fleet.count
    net.load_state_dict(state)
    h, y = encoded(net.extractor, data[0]), data[1].cpu()
    starts = [build(fleet.networks.expert).state_dict() for _ in range(n)]
    experts = {key: torch.stack([start[key] for start in starts]).requires_grad_() for key in starts[0]}
    gate = nn.Linear(config.extractor.dim, n)
    every = vmap(lambda expert, rows: functional_call(fleet.expert, expert, (rows,)), in_dims=(0, None), out_dims=1)
    batch = config.experts.batch * n  # as many steps an epoch as the clients take side by side
    steps = config.experts.epochs * -(-len(y) // batch)
    learned = [*experts.values(), *gate.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE, weight_decay=config.experts.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(config.experts.epochs):
        g = generator(seed, "centralised", epoch)
        total = 0.0
        for rows in torch.randperm(len(y), generator=g).split(batch):
            noise = config.gate.noise * torch.randn(len(rows), n, generator=g)
            log_g = (gate(h[rows]) + noise).log_softmax(1)
            said = every(experts, h[rows])  # (B, N, K)
            if config.gate.loss == "probabilities":
                said = said.log_softmax(2)[torch.arange(len(rows)), :, y[rows]]
            loss = mixture_loss(log_g, said, y[rows], config.gate.loss).mean()
            loss = loss + SPREAD * load_loss(log_g.exp(), torch.ones(len(rows)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        updates = [Update(0, {key: value.detach() for key, value in experts.items()}, len(y), total / len(y))]
        check("experts", epoch, updates)
        progress(report("mixture", epoch, config.experts.epochs, updates))
    rules = Inference(config.inference.top_k, config.gate.loss, None, config.inference.adapt)
    figures: dict[str, Any] = {}
    with torch.no_grad():
        for part, parts, truth in _tests(fleet):
            seen = [(i, encoded(net.extractor, x), y) for i, (x, y) in (parts if part == "own" else parts[:1])]
            rows = [DeviceRows(gate(h), every(experts, h), y) for _, h, y in seen]
            said = [answers(r, 0, rules) for r in rows]
            routing = torch.stack([went.mean(0) for _, went in said] * (fleet.count // len(said)))
            figures[part] = measure([p for p, _ in said], truth[: len(said)])
            figures[part] |= {"routing": routing.tolist(), "kept_local": routing.diag().mean().item()}
    return figures
