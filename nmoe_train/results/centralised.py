"""The centralised baseline: a mixture of experts trained on the samples of all clients in one place.

Its extractor, experts and gate have the shapes of the run's. The experts start from new weights and are trained
together with the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nmoe_train.nets import build
from nmoe_train.results.evaluation import DeviceRows, answers, measure
from nmoe_train.run import Inference
from nmoe_train.stages.federation import Update, generator, report, require_finite
from nmoe_train.stages.losses import load_loss, mixture_loss, true_class_log_p
from nmoe_train.trainer import Progress, Trainer, encode

RATE = 2e-3
"""Learning rate of the experts."""
LOAD_LOSS = 0.01
"""Weight of the load loss; without it, one expert answers every row."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Experts and a gate on latents."""

    every_expert: Callable[[dict[str, Tensor], Tensor], Tensor]
    """(stacked weights, latents (n, d)) -> (n, N, K)"""
    experts: dict[str, Tensor]
    """Weights of all experts, stacked: each (N, …)"""
    gate: nn.Linear


def _fresh_mixture(trainer: Trainer) -> Mixture:
    states = [build(trainer.specs.expert).state_dict() for _ in range(trainer.count)]
    experts = {key: torch.stack([state[key] for state in states]).requires_grad_() for key in states[0]}
    every_expert = vmap(
        lambda weights, h: functional_call(trainer.expert, weights, (h,)), in_dims=(0, None), out_dims=1
    )
    return Mixture(every_expert, experts, nn.Linear(trainer.config.extractor.dim, trainer.count))


def train_mixture(trainer: Trainer, h: Tensor, y: Tensor, progress: Progress) -> Mixture:
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


def _mixture_loss(trainer: Trainer, mixture: Mixture, h: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
    """Mean loss of a batch: the gate's noisy mixture, and the loss that spreads rows over experts."""
    config = trainer.config.gate
    noise = config.noise * torch.randn(len(y), trainer.count, generator=g)
    log_g = (mixture.gate(h) + noise).log_softmax(1)  # (B, N)
    outputs = mixture.every_expert(mixture.experts, h)  # (B, N, K)
    if config.loss != "outputs":
        outputs = true_class_log_p(outputs, y)  # (B, N)
    loss = mixture_loss(log_g, outputs, y, config.loss).mean()
    return loss + LOAD_LOSS * load_loss(log_g.exp(), torch.ones(len(y)))


def measure_mixture(trainer: Trainer, extractor: nn.Module, mixture: Mixture) -> dict[str, Any]:
    config = trainer.config
    rules = Inference(config.inference.top_k, config.gate.combination, None, config.inference.adapt)
    figures: dict[str, Any] = {}
    for name, parts in trainer.clients.tests().items():
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
