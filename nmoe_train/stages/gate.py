"""Stage 3: the gate, which knows whom to ask.

    RanGate    a draw that knows nothing, with given shares; the latent decides, so that it is the same everywhere
    RollGate   passed round the ring; each client labels its samples with itself (p = 0.7) or another, and trains it
    FedGate    min over G of  -log Σⱼ gⱼ(h) pⱼ(y|h),   g = softmax(G(h) + ε),   federally

Experts are frozen, so what they say to a client's latents is computed once. The dense mixture is trained, because the
softmax over one kept score is constant; the top-k is taken at inference. With partial synchronisation the scores are
shared(h) + own(h), and only the shared part is averaged: the own part lets a device lean to itself. All clients of a
round are trained at once, with stacked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from nmoe_train.config import GateConfig
from nmoe_train.stages.federation import (
    Round,
    State,
    Update,
    attending,
    average,
    check,
    cosine,
    generator,
    report,
    size,
)
from nmoe_train.stages.losses import load_loss, mixture_loss


@dataclass(frozen=True, slots=True, eq=False)
class GateSamples:
    """One client's training data for its gate."""

    latents: Tensor
    """(n, d)"""
    expert_answers: Tensor
    """With gate.loss = "outputs" every expert's outputs (n, N, K); else its log-probability of the truth (n, N)"""
    y: Tensor
    """True classes (n,)"""


def gate_samples(h: Tensor, outputs: Tensor, y: Tensor, kind: str) -> GateSamples:
    """What a mixture's loss needs of every expert's outputs (n, N, K)."""
    if kind == "probabilities":
        outputs = outputs.log_softmax(2)[torch.arange(len(y)), :, y]  # (n, N)
    return GateSamples(h, outputs, y)


class Gate(nn.Module):
    """shared(h) + own(h), own(h) being nothing, a bias, or a linear layer."""

    def __init__(self, shared: nn.Module, dim: int, experts: int, own: str) -> None:
        """Prefers nobody: the last layer that learns starts as zero, and so does the own part."""
        super().__init__()
        last = [layer for layer in shared.modules() if isinstance(layer, nn.Linear)][-1:]
        for parameter in (p for layer in last for p in layer.parameters()):
            nn.init.zeros_(parameter)
        shapes = {
            "nothing": {},
            "bias": {"bias": (experts,)},
            "weights": {"bias": (experts,), "weight": (experts, dim)},
        }
        self.shared, self.experts = shared, experts
        self.own = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes[own].items()})

    def forward(self, h: Tensor) -> Tensor:
        """(n, d) -> (n, experts)"""
        scores = self.shared(h)
        scores = scores + self.own["bias"] if "bias" in self.own else scores
        return scores + h @ self.own["weight"].T if "weight" in self.own else scores


def exported(gate: State) -> dict[str, Tensor]:
    """The same gate as its shared part alone, which takes the own part in."""
    state = {key.removeprefix("shared."): value for key, value in gate.items() if key.startswith("shared.")}
    if "own.bias" in gate:
        last = max((key for key in state if key.endswith("bias")), key=lambda key: (len(key), key))
        state[last] = state[last] + gate["own.bias"]
    if "own.weight" in gate:
        state["weight"] = state["weight"] + gate["own.weight"]
    return state


def imported(state: State, own: State) -> dict[str, Tensor]:
    """The gate that was exported so; own: an own part of zeros."""
    return {**{f"shared.{key}": value for key, value in state.items()}, **own}


def fedgate_round(
    net: Gate, gates: Sequence[State], data: Sequence[GateSamples], round_: int, seed: int, config: GateConfig
) -> tuple[list[State], Round]:
    """One round: every client's gate before -> after."""
    rate = config.rate * cosine(round_, config.rounds)
    here, lost = attending(len(data), config.share, config.drop, seed, "gate", round_)
    updates = _stacked_updates(net, gates, data, here, rate, round_, seed, config) if here else []
    check("gate", round_, updates)
    sent = size({key: value for key, value in gates[0].items() if key.startswith("shared.")})
    told = report("gate", round_, config.rounds, updates, lost, sent)
    if not updates:
        return list(gates), told
    shared = {key: value for key, value in average(updates).items() if key.startswith("shared.")}
    latest = dict(enumerate(gates)) | {update.client: update.state for update in updates}
    return [{**latest[i], **shared} for i in range(len(gates))], told


def _stacked_updates(
    net: Gate,
    gates: Sequence[State],
    data: Sequence[GateSamples],
    here: Sequence[int],
    rate: float,
    round_: int,
    seed: int,
    config: GateConfig,
) -> list[Update]:
    """The local steps of FedGate of all clients that are here, at once: each one's numbers are those it has alone."""
    forward = vmap(lambda state, h: functional_call(net, state, (h,)))
    theta = {key: torch.stack([gates[i][key] for i in here]) for key in gates[here[0]]}
    learned = sorted(theta)
    sources = [generator(seed, "gate", round_, i) for i in here]
    total = torch.zeros(len(here))
    for _ in range(config.local_steps):
        drawn = [_drawn(len(data[i].y), config, net.experts, g) for i, g in zip(here, sources, strict=True)]
        noise, present = torch.stack([d[1] for d in drawn]), torch.stack([d[2] for d in drawn])
        h, said, y = (
            torch.stack([getattr(data[i], name)[rows] for i, (rows, _, _) in zip(here, drawn, strict=True)])
            for name in ("latents", "expert_answers", "y")
        )
        for key in learned:
            theta[key].requires_grad_()
        log_g = (forward(theta, h) + noise).log_softmax(2)  # (clients, B, N)
        losses = (mixture_loss(log_g, said, y, config.loss) * present).sum(1) / present.sum(1)
        if config.load_loss:
            losses = losses + config.load_loss * load_loss(log_g.exp(), present)
        gradients = torch.autograd.grad(losses.sum(), [theta[key] for key in learned])
        scale = _step_sizes([gradient.flatten(1) for gradient in gradients], rate, config)
        for key, gradient in zip(learned, gradients, strict=True):
            theta[key] = theta[key].detach() - scale.view(-1, *[1] * (gradient.ndim - 1)) * gradient
        total += losses.detach()
    return [
        Update(
            client,
            {key: value[j] for key, value in theta.items()},
            len(data[client].y),
            total[j].item() / config.local_steps,
        )
        for j, client in enumerate(here)
    ]


def _drawn(samples: int, config: GateConfig, experts: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's rows (B,), the noise on their scores (B, N), and a one for each that is no padding (B,)."""
    rows = torch.randperm(samples, generator=g)[: config.batch]
    noise = config.noise * torch.randn(config.batch, experts, generator=g)
    padding = config.batch - len(rows)
    present = torch.cat([torch.ones(len(rows)), torch.zeros(padding)])
    return torch.cat([rows, torch.zeros(padding, dtype=torch.long)]), noise, present


def _step_sizes(gradients: Sequence[Tensor], rate: float, config: GateConfig) -> Tensor:
    """The rate over each gradient's length: always (unit), or only when it is over one (clipped). -> (clients,)"""
    length = torch.cat(list(gradients), 1).norm(dim=1)
    return rate / (length + 1e-12) if config.step == "unit" else rate / length.clamp(min=1)


def rollgate_stop(
    net: Gate, gates: Sequence[State], data: Sequence[GateSamples], stop: int, seed: int, config: GateConfig
) -> tuple[list[State], Round]:
    """One stop of RollGate: the client whose turn it is trains the one gate for an epoch, then hands it on.

    Its samples are labelled with itself with probability p, else with any other expert.
    """
    client, experts = visited(stop, len(data), seed, config), len(data)
    h = data[client].latents
    g = generator(seed, "rollgate", stop, client)
    others = torch.randint(0, experts - 1, (len(h),), generator=g)
    others = others + (others >= client)
    label = torch.where(torch.rand(len(h), generator=g) < config.roll_own, client, others)
    gate = dict(gates[0])
    learned = sorted(key for key in gate if key.startswith("shared."))
    rate, total, hits = config.rate * cosine(stop, config.laps * experts), 0.0, 0
    for batch in torch.randperm(len(h), generator=g).split(config.batch):
        theta = {key: gate[key].detach().requires_grad_(key in learned) for key in gate}
        scores = functional_call(net, theta, (h[batch],))
        loss = cross_entropy(scores, label[batch])
        gradients = torch.autograd.grad(loss, [theta[key] for key in learned])
        scale = _step_sizes([gradient.flatten()[None] for gradient in gradients], rate, config)
        for key, gradient in zip(learned, gradients, strict=True):
            gate[key] = gate[key] - scale * gradient
        total, hits = total + loss.item() * len(batch), hits + int((scores.argmax(1) == label[batch]).sum())
    update = Update(client, gate, len(h), total / len(h), hits / len(h))
    check("gate", stop, [update])
    sent = size({key: gate[key] for key in learned})
    return [gate] * experts, report("gate", stop, config.laps * experts, [update], sent=sent)


def visited(stop: int, clients: int, seed: int, config: GateConfig) -> int:
    """Whom RollGate visits: everybody once a lap, round the ring or in an order that each lap draws anew."""
    lap, place = divmod(stop, clients)
    if config.order == "ring":
        return place
    return int(torch.randperm(clients, generator=generator(seed, "order", lap))[place])
