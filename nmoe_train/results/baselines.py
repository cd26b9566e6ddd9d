"""What a run is compared with: baselines on the same data and split, with as many epochs, and without dropped clients.

local        every client trains a whole classifier on its own samples; nothing is averaged
fedavg       one classifier for all clients, trained as in FedCE; taken from the run when its stage 1 trained one
centralised  all samples in one place: an extractor, experts and a gate of the same shapes, trained as a plain mixture
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nmoe_edge.common.schema import parse_json
from nmoe_train.checkpoint import Checkpoint, claim_folder
from nmoe_train.config import ExtractorConfig
from nmoe_train.data.clients import Part
from nmoe_train.errors import RunError
from nmoe_train.nets import build
from nmoe_train.pipeline import torch_settings, trainer_of
from nmoe_train.recipes import configure
from nmoe_train.results.evaluation import DeviceRows, answers, apply_class_mix, measure
from nmoe_train.results.pages.run_page import page
from nmoe_train.run import Inference, Run, write_unlisted
from nmoe_train.stages.extractor import Headed, fedce_round, fedce_update
from nmoe_train.stages.federation import Round, State, Update, cosine, generator, report, require_finite
from nmoe_train.stages.losses import load_loss, mixture_loss, true_class_log_p
from nmoe_train.stages.weights import to_device
from nmoe_train.trainer import Progress, Trainer, encode

METHODS = ("local", "fedavg", "centralised")
FILE = "baselines.json"
RATE = 2e-3
"""Learning rate of the centralised mixture's experts, which start from new weights."""
LOAD_LOSS = 0.01
"""Weight of the centralised mixture's load loss; without it, one expert answers every row."""


def baselines(run: Run, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Train and measure the baselines that the run's baselines.json does not hold yet, and return all of them.

    After each one, baselines.json and report.html are updated. A training that is interrupted continues with the next
    call. The result maps a method to its figures on `own` and `iid`, as in metrics.json. Raises TrainError.
    """
    out = run.folder.with_name(f"{run.folder.name}-baselines")
    with claim_folder(out) as path, torch_settings(run.record.config.get("threads", 1)):
        trainer, _ = trainer_of(run)
        found = read_baselines(run)
        for name in METHODS:
            if name not in found:
                found[name] = _train_and_measure(trainer, run, name, path, progress)
                write_unlisted(run, FILE, json.dumps(found, indent=2, allow_nan=False) + "\n")
                path.unlink(missing_ok=True)
        text = page(run.folder.name, run.record.config, run.metrics, run.record.labels or (), by_part(found))
        write_unlisted(run, "report.html", text)
        return found


def read_baselines(run: Run) -> dict[str, Any]:
    """What baselines.json holds so far, by method; empty when there is no such file."""
    path = run.folder / FILE
    try:
        plain = parse_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; remove it to measure again") from error
    if not isinstance(plain, dict):
        raise RunError(f"{path}: not a JSON object; remove it to measure again")
    return plain


def by_part(found: dict[str, Any]) -> dict[str, Any]:
    """The same figures, by test set first and then by method, as in metrics.json."""
    return {part: {name: figures[part] for name, figures in found.items()} for part in ("own", "iid")}


def _train_and_measure(trainer: Trainer, run: Run, name: str, path: Path, progress: Progress) -> dict[str, Any]:
    """The figures of one baseline. `path`: the checkpoint that its training continues from and writes"""
    has_fedavg = run.record.networks.head is not None and trainer.config.extractor.heads == "shared"
    if name == "fedavg" and has_fedavg:
        return {part: run.metrics[part]["fedce"] for part in ("own", "iid")}
    torch.manual_seed(trainer.config.seed)
    head = trainer.specs.head or trainer.config.expert_net(trainer.classes)
    net = Headed(build(trainer.specs.extractor), build(head)).to(trainer.device)
    data = [(x.to(trainer.device), y.to(trainer.device)) for x, y in trainer.clients.train]
    if name == "centralised":
        data = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    states = _train_classifiers(trainer, net, data, name, run, path, progress)
    if name == "centralised":
        net.load_state_dict(states[0])
        x, y = data[0]
        mixture = _train_mixture(trainer, encode(net.extractor, x), y.cpu(), progress)
        return _measure_mixture(trainer, net.extractor, mixture)
    # A classifier of one client already carries that client's class mix.
    rules = replace(run.record.inference, adapt=run.record.inference.adapt and name == "fedavg")
    return _measure_classifiers(trainer, net, states, rules)


def _settings(trainer: Trainer) -> ExtractorConfig:
    """FedCE's settings with every client in every round: the run's own, or the defaults for its data."""
    config = trainer.config.extractor
    if config.method != "fedce":
        usual = configure(flags={"data": {"name": trainer.config.data.name}}).extractor
        config = replace(usual, backbone=config.backbone, arguments=config.arguments, dim=config.dim)
    return replace(config, heads="shared", share=1.0, drop=0.0, step_limit=None)


def _train_classifiers(
    trainer: Trainer, net: Headed, data: Sequence[Part], name: str, run: Run, path: Path, progress: Progress
) -> Sequence[State]:
    """One classifier per entry of `data`, after all rounds; averaged in every round unless `name` is "local"."""
    config = _settings(trainer)
    checkpoint = _begin_or_resume(path, run, name)
    fresh = {key: value.detach().clone() for key, value in net.state_dict().items()}
    states: Sequence[State] = to_device(checkpoint.states.get(name, [fresh] * len(data)), trainer.device)
    train_round = _local_round if name == "local" else fedce_round
    for round_ in range(checkpoint.round, config.rounds):
        states, finished = train_round(net, states, data, round_, trainer.config.seed, config)
        replace(checkpoint, round=round_ + 1, states={name: states}).write(path)
        progress(replace(finished, stage=name))
    return states


def _begin_or_resume(path: Path, run: Run, name: str) -> Checkpoint:
    """The checkpoint at `path` when it belongs to this run and baseline, else an empty one."""
    empty = Checkpoint(dict(run.record.config), name, fingerprint=run.record.data.fingerprint)
    if not path.exists():
        return empty
    stored = Checkpoint.read(path)
    belongs = (stored.config, stored.stage, stored.fingerprint) == (empty.config, name, empty.fingerprint)
    return stored if belongs else empty


def _local_round(
    net: nn.Module, states: Sequence[State], data: Sequence[Part], round_: int, seed: int, config: ExtractorConfig
) -> tuple[list[State], Round]:
    """One round of FedCE without the averaging."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    updates = [
        fedce_update(net, states[i], i, *data[i], rate, config, generator(seed, "extractor", round_, i))
        for i in range(len(data))
    ]
    require_finite("extractor", round_, updates)
    return [update.state for update in updates], report("local", round_, config.rounds, updates)


def _test_sets(trainer: Trainer) -> dict[str, list[Part]]:
    """Each device's test set, by name: its own distribution, and the balanced set that all devices share."""
    return {"own": trainer.clients.own_test, "iid": [trainer.clients.test] * trainer.count}


def _measure_classifiers(trainer: Trainer, net: Headed, states: Sequence[State], rules: Inference) -> dict[str, Any]:
    figures = {}
    for name, parts in _test_sets(trainer).items():
        probabilities = []
        for state, (x, _) in zip(states, parts, strict=True):
            net.load_state_dict(state)
            probabilities.append(apply_class_mix(encode(net, x).softmax(1), rules))
        figures[name] = measure(probabilities, [y for _, y in parts])
    return figures


@dataclass(frozen=True, slots=True, eq=False)
class _Mixture:
    """Experts and a gate on latents."""

    every_expert: Callable[[dict[str, Tensor], Tensor], Tensor]
    """(stacked weights, latents (n, d)) -> (n, N, K)"""
    experts: dict[str, Tensor]
    """Weights of all experts, stacked: each (N, …)"""
    gate: nn.Linear


def _fresh_mixture(trainer: Trainer) -> _Mixture:
    states = [build(trainer.specs.expert).state_dict() for _ in range(trainer.count)]
    experts = {key: torch.stack([state[key] for state in states]).requires_grad_() for key in states[0]}
    every_expert = vmap(
        lambda weights, h: functional_call(trainer.expert, weights, (h,)), in_dims=(0, None), out_dims=1
    )
    return _Mixture(every_expert, experts, nn.Linear(trainer.config.extractor.dim, trainer.count))


def _train_mixture(trainer: Trainer, h: Tensor, y: Tensor, progress: Progress) -> _Mixture:
    """Experts and gate, trained together on the latents h (n, d) and labels y (n,) of all clients."""
    config = trainer.config
    mixture = _fresh_mixture(trainer)
    batch = config.experts.batch * trainer.count  # as many steps per epoch as the clients take in parallel
    epochs = config.experts.epochs
    steps_per_epoch = -(-len(y) // batch)
    learned = [*mixture.experts.values(), *mixture.gate.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE, weight_decay=config.experts.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps_per_epoch)
    for epoch in range(epochs):
        g = generator(config.seed, "centralised", epoch)
        total = 0.0
        for rows in torch.randperm(len(y), generator=g).split(batch):
            loss = _mixture_loss(trainer, mixture, h[rows], y[rows], g)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        state = {key: value.detach() for key, value in mixture.experts.items()}
        updates = [Update(0, state, len(y), total / len(y))]
        require_finite("experts", epoch, updates)
        progress(report("mixture", epoch, epochs, updates))
    return mixture


def _mixture_loss(trainer: Trainer, mixture: _Mixture, h: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
    """Mean loss of a batch: the gate's noisy mixture, and the loss that spreads rows over experts."""
    config = trainer.config.gate
    noise = config.noise * torch.randn(len(y), trainer.count, generator=g)
    log_g = (mixture.gate(h) + noise).log_softmax(1)  # (B, N)
    outputs = mixture.every_expert(mixture.experts, h)  # (B, N, K)
    if config.loss == "probabilities":
        outputs = true_class_log_p(outputs, y)  # (B, N)
    loss = mixture_loss(log_g, outputs, y, config.loss).mean()
    return loss + LOAD_LOSS * load_loss(log_g.exp(), torch.ones(len(y)))


def _measure_mixture(trainer: Trainer, extractor: nn.Module, mixture: _Mixture) -> dict[str, Any]:
    config = trainer.config
    rules = Inference(config.inference.top_k, config.gate.combination, None, config.inference.adapt)
    figures: dict[str, Any] = {}
    for name, parts in (("own", trainer.clients.own_test), ("iid", [trainer.clients.test])):
        probabilities = []
        routing = []
        for x, y in parts:
            h = encode(extractor, x)
            with torch.no_grad():
                rows = DeviceRows(mixture.gate(h), mixture.every_expert(mixture.experts, h), y)
            p, routed = answers(rows, 0, rules)  # without local_first, the number of the device does not matter
            probabilities.append(p)
            routing.append(routed.mean(0))
        matrix = torch.stack(routing * (trainer.count // len(parts)))  # (devices, N)
        figures[name] = measure(probabilities, [y for _, y in parts])
        figures[name] |= {"routing": matrix.tolist(), "kept_local": matrix.diag().mean().item()}
    return figures
