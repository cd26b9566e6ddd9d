"""Stage 3: the gate, which knows whom to ask.

    RanGate    a fixed random linear map of the latent: nobody trained it, but like latents go the same way
    RollGate   passed round the ring; each client labels its samples with itself (p = 0.7) or another, and trains it
    FedGate    min over G of  -log Σⱼ gⱼ(h) pⱼ(y|h),   g = softmax(G(h) + ε),   federally

Experts are frozen, so what they say to a client's latents is computed once. The dense mixture is trained, because the
softmax over one kept score is constant; the top-k is taken at inference. With partial synchronisation the scores are
shared(h) + bᵢ, and only the shared part is averaged: bᵢ lets a device lean to itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nmoe_train.config import GateConfig
from nmoe_train.federation import State, Update, average, check_losses, cosine, generator, participants

OWN_BIAS = "own"
"""The key of a device's own bias beside the shared `weight` and `bias`."""


def fresh_gate(dim: int, experts: int) -> dict[str, Tensor]:
    """A linear gate that prefers nobody."""
    return {"weight": torch.zeros(experts, dim), "bias": torch.zeros(experts), OWN_BIAS: torch.zeros(experts)}


def random_gate(dim: int, experts: int, seed: int) -> dict[str, Tensor]:
    """RanGate: a linear gate with random weights, the same on every device and for every latent."""
    weight = torch.randn(experts, dim, generator=generator(seed, "rangate"))
    return {**fresh_gate(dim, experts), "weight": weight}


def scores(gate: State, h: Tensor) -> Tensor:
    """shared(h) + bᵢ. (n, d) -> (n, experts)"""
    return h @ gate["weight"].T + gate["bias"] + gate[OWN_BIAS]


def exported(gate: State) -> dict[str, Tensor]:
    """The same gate as one linear layer."""
    return {"weight": gate["weight"], "bias": gate["bias"] + gate[OWN_BIAS]}


def mixture_loss(g: Tensor, outputs: Tensor, y: Tensor, kind: str) -> Tensor:
    """-log of the mixture's probability of the truth. g: (B, N), outputs: (B, N, K), y: (B,)"""
    if kind == "outputs":
        return cross_entropy((g[:, :, None] * outputs).sum(1), y)
    log_p = outputs.log_softmax(2)[torch.arange(len(y)), :, y]  # (B, N)
    return -(g.log() + log_p).logsumexp(1).mean()


def load_loss(g: Tensor) -> Tensor:
    """Switch: N · Σ f̄ⱼ P̄ⱼ, f̄ the share of rows whose favourite is j, P̄ the mean of gⱼ; 1 when balanced. g: (B, N)"""
    n = g.shape[1]
    favourite = torch.bincount(g.argmax(1), minlength=n) / len(g)
    return n * (favourite * g.mean(0)).sum()


def client_update(
    gate: State, client: int, h: Tensor, outputs: Tensor, y: Tensor, rate: float, config: GateConfig, g: torch.Generator
) -> Update:
    """A client's local steps of FedGate. h: (n, d), outputs: (n, N, K) of all experts on h, y: (n,)"""
    theta = {key: value.clone() for key, value in gate.items()}
    learned = ["weight", "bias"] if config.synchronise == "all" else ["weight", "bias", OWN_BIAS]
    total = 0.0
    for _ in range(config.local_steps):
        batch = torch.randperm(len(h), generator=g)[: config.batch]
        for key in learned:
            theta[key].requires_grad_()
        noise = config.noise * torch.randn(len(batch), outputs.shape[1], generator=g)
        mix = (scores(theta, h[batch]) + noise).softmax(1)
        loss = mixture_loss(mix, outputs[batch], y[batch], config.loss)
        if config.load_loss:
            loss = loss + config.load_loss * load_loss(mix)
        gradients = torch.autograd.grad(loss, [theta[key] for key in learned])
        scale = _step_size(gradients, rate, config)
        for key, gradient in zip(learned, gradients, strict=True):
            theta[key] = theta[key].detach() - scale * gradient
        total += loss.item()
    return Update(client, theta, len(h), total / config.local_steps)


def fedgate_round(
    gates: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor, Tensor]],
    round_: int,
    seed: int,
    config: GateConfig,
) -> tuple[list[State], float]:
    """One round: every client's gate before -> after, and the mean loss. data: each client's (h, outputs, y)"""
    rate = config.rate * cosine(round_, config.rounds)
    updates = [
        client_update(gates[i], i, *data[i], rate, config, generator(seed, "gate", round_, i))
        for i in participants(len(data), config.share, seed, "gate", round_)
    ]
    loss = check_losses("gate", round_, updates)
    shared, own = average(updates), {update.client: update.state[OWN_BIAS] for update in updates}
    return [{**shared, OWN_BIAS: own.get(i, gates[i][OWN_BIAS])} for i in range(len(gates))], loss


def rollgate_stop(
    gates: Sequence[State],
    data: Sequence[tuple[Tensor, Tensor, Tensor]],
    stop: int,
    seed: int,
    config: GateConfig,
) -> tuple[list[State], float]:
    """One stop of RollGate: the client whose turn it is trains the one gate for an epoch, then hands it on.

    Its samples are labelled with itself with probability p, else with any other expert.
    """
    client = stop % len(data)
    h, outputs, _ = data[client]
    g = generator(seed, "rollgate", stop, client)
    others = torch.randint(0, outputs.shape[1] - 1, (len(h),), generator=g)
    others = others + (others >= client)
    label = torch.where(torch.rand(len(h), generator=g) < config.roll_own, client, others)
    gate = {key: value.clone() for key, value in gates[0].items()}
    rate, total = config.rate * cosine(stop, config.laps * len(data)), 0.0
    for batch in torch.randperm(len(h), generator=g).split(config.batch):
        learned = [gate[key].requires_grad_() for key in ("weight", "bias")]
        loss = cross_entropy(scores(gate, h[batch]), label[batch])
        gradients = torch.autograd.grad(loss, learned)
        scale = _step_size(gradients, rate, config)
        for key, gradient in zip(("weight", "bias"), gradients, strict=True):
            gate[key] = gate[key].detach() - scale * gradient
        total += loss.item() * len(batch)
    check_losses("gate", stop, [Update(client, gate, len(h), total / len(h))])
    return [gate] * len(gates), total / len(h)


def _step_size(gradients: Sequence[Tensor], rate: float, config: GateConfig) -> Tensor:
    """The rate over the gradient's length: always (unit), or only when it is longer than one (clipped)."""
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return rate / (length + 1e-12) if config.step == "unit" else rate / length.clamp(min=1)
