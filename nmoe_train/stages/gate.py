"""Stage 3: the gate G, which scores every expert for a latent h; a row goes to the k experts with the highest scores.

    RanGate    draws an expert at random with given shares; nothing is trained (the network is `Random` in nets.py)
    RollGate   is a classifier "which client is this latent from?" that travels from client to client; each client
               labels a share p = 0.7 of its latents with its own number, the rest with other clients at random
    FedGate    trains the gate with the frozen experts as a mixture, and averages it by FedAvg:

        min over G   -log Σⱼ gⱼ(h) pⱼ(y|h)       g = softmax(G(h) + ε),  pⱼ = softmax(Hⱼ(h)),  ε: Gaussian noise

As in the paper, FedGate normalises gradients and trains 70 % of the clients in a round. Where this deviates from it:

- The paper's gate is softmax(top-k(G(h) + ε)): gate.train_top_k keeps that many scores in training too, at least two,
  because the softmax over one kept score is 1 and has no gradient. By default training uses the softmax over all
  experts, and top-k applies at inference only.
- The paper mixes the experts' outputs, equation (1): gate.loss = "outputs". Our default mixes their probabilities, as
  the formula above does. A third loss, "expected", does not mix at all (losses.mixture_loss has all three).
- A client may keep a part of the gate to itself (partial synchronisation): scores are shared(h) + own(h), and only the
  shared part is sent and averaged. The own part lets a device prefer, for example, its own expert.
- RollGate makes a fixed number of laps instead of training until it converges.

The experts are frozen, so their outputs for a client's latents are computed once, before the first round. All clients
of a round are trained at once with stacked weights, which gives each client the numbers it would get alone.

Shapes: n rows, B rows of a batch, d numbers of a latent, N experts (one per client), K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    active_clients,
    average,
    cosine,
    generator,
    report,
    require_finite,
    size_bytes,
    stack_states,
)
from nmoe_train.stages.losses import load_loss, mixture_loss, true_class_log_p


@dataclass(frozen=True, slots=True, eq=False)
class GateSamples:
    """One client's training data for its gate."""

    latents: Tensor
    """(n, d)"""
    expert_answers: Tensor
    """With gate.loss = "outputs" every expert's outputs (n, N, K); else its log-probability of the truth (n, N)"""
    y: Tensor
    """True classes (n,)"""


def gate_samples(latents: Tensor, outputs: Tensor, y: Tensor, kind: str) -> GateSamples:
    """What the loss `kind` needs of every expert's outputs (n, N, K)."""
    answers = outputs if kind == "outputs" else true_class_log_p(outputs, y)
    return GateSamples(latents, answers, y)


class Gate(nn.Module):
    """Scores of all experts: shared(h) + own(h). own(h) is nothing, a bias, or a linear layer."""

    def __init__(self, shared: nn.Module, dim: int, experts: int, own: str) -> None:
        """A fresh gate scores every expert 0: the last linear layer and the own part start as zeros."""
        super().__init__()
        linear_layers = [layer for layer in shared.modules() if isinstance(layer, nn.Linear)]
        for layer in linear_layers[-1:]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        shapes = {
            "nothing": {},
            "bias": {"bias": (experts,)},
            "weights": {"bias": (experts,), "weight": (experts, dim)},
        }
        self.shared = shared
        self.experts = experts
        self.own = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes[own].items()})

    def forward(self, h: Tensor) -> Tensor:
        """(n, d) -> (n, N)"""
        scores = self.shared(h)
        if "bias" in self.own:
            scores = scores + self.own["bias"]
        if "weight" in self.own:
            scores = scores + h @ self.own["weight"].T
        return scores


def plain_gate(gate: State) -> dict[str, Tensor]:
    """One device's gate as a plain network: the own part is folded into the last layer of the shared part."""
    state = {key.removeprefix("shared."): value for key, value in _shared_part(gate).items()}
    if "own.bias" in gate:
        biases = [key for key in state if key.endswith("bias")]
        last = max(biases, key=lambda key: (len(key), key))  # by length first: layer 10 comes after layer 2
        state[last] = state[last] + gate["own.bias"]
    if "own.weight" in gate:
        state["weight"] = state["weight"] + gate["own.weight"]
    return state


def composed_gate(state: State, own: State) -> dict[str, Tensor]:
    """A run's gate as training state. The own part stays merged into the shared one; `own` (zeros) takes its place."""
    return {**{f"shared.{key}": value for key, value in state.items()}, **own}


def _shared_part(gate: State) -> dict[str, Tensor]:
    return {key: value for key, value in gate.items() if key.startswith("shared.")}


def fedgate_round(
    net: Gate, gates: Sequence[State], data: Sequence[GateSamples], round_: int, seed: int, config: GateConfig
) -> tuple[list[State], Round]:
    """One round of FedGate: every client's gate before -> after."""
    rate = config.rate * cosine(round_, config.rounds)
    active, dropped = active_clients(len(data), config.share, config.drop, seed, "gate", round_)
    updates = _stacked_updates(net, gates, data, active, rate, round_, seed, config) if active else []
    require_finite("gate", round_, updates)
    summary = report("gate", round_, config.rounds, updates, dropped, size_bytes(_shared_part(gates[0])))
    if not updates:
        return list(gates), summary
    shared = _shared_part(average(updates))
    latest = dict(enumerate(gates)) | {update.client: update.state for update in updates}
    return [{**latest[i], **shared} for i in range(len(gates))], summary


def _stacked_updates(
    net: Gate,
    gates: Sequence[State],
    data: Sequence[GateSamples],
    active: Sequence[int],
    rate: float,
    round_: int,
    seed: int,
    config: GateConfig,
) -> list[Update]:
    """The local steps of all active clients at once; each client's numbers are those it would get alone."""
    theta = stack_states([gates[i] for i in active])
    samples = [data[i] for i in active]
    generators = [generator(seed, "gate", round_, i) for i in active]
    total = torch.zeros(len(active))
    for _ in range(config.local_steps):
        batches = [_draw_batch(s, g, config, net.experts) for s, g in zip(samples, generators, strict=True)]
        theta = {key: value.detach().requires_grad_() for key, value in theta.items()}
        losses = _losses(net, theta, _stack(batches), config)  # (clients,)
        # Summed over clients, so each gets the gradient of its own loss.
        gradients = torch.autograd.grad(losses.sum(), list(theta.values()))
        theta = _step(theta, gradients, rate, config)
        total += losses.detach()
    updates = []
    for position, client in enumerate(active):
        state = {key: value[position] for key, value in theta.items()}
        mean_loss = total[position].item() / config.local_steps
        updates.append(Update(client, state, len(data[client].y), mean_loss))
    return updates


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """One batch of a client, or the batches of all active clients stacked: shapes then begin with (clients, …)."""

    latents: Tensor
    """(B, d)"""
    expert_answers: Tensor
    """(B, N, K) or (B, N), as in GateSamples"""
    y: Tensor
    """(B,)"""
    noise: Tensor
    """ε, added to the scores (B, N)"""
    present: Tensor
    """1 for a row, 0 for padding (B,)"""


def _draw_batch(samples: GateSamples, g: torch.Generator, config: GateConfig, experts: int) -> _Batch:
    """A random batch of one client. If the client has fewer than B samples, its first sample pads the batch."""
    rows = torch.randperm(len(samples.y), generator=g)[: config.batch]
    noise = config.noise * torch.randn(config.batch, experts, generator=g)
    padding = config.batch - len(rows)
    present = torch.cat([torch.ones(len(rows)), torch.zeros(padding)])
    rows = torch.cat([rows, torch.zeros(padding, dtype=torch.long)])
    return _Batch(samples.latents[rows], samples.expert_answers[rows], samples.y[rows], noise, present)


def _stack(batches: Sequence[_Batch]) -> _Batch:
    return _Batch(
        latents=torch.stack([batch.latents for batch in batches]),
        expert_answers=torch.stack([batch.expert_answers for batch in batches]),
        y=torch.stack([batch.y for batch in batches]),
        noise=torch.stack([batch.noise for batch in batches]),
        present=torch.stack([batch.present for batch in batches]),
    )


def _losses(net: Gate, theta: State, batch: _Batch, config: GateConfig) -> Tensor:
    """Each client's mean loss over the rows of its batch, from stacked weights and a stacked batch. -> (clients,)"""
    forward = vmap(lambda state, h: functional_call(net, state, (h,)))
    scores = forward(theta, batch.latents) + batch.noise  # (clients, B, N)
    if config.train_top_k is not None and config.train_top_k < scores.shape[2]:
        least_kept = scores.topk(config.train_top_k, 2).values[:, :, -1:]
        scores = scores.masked_fill(scores < least_kept, -torch.inf)
    log_g = scores.log_softmax(2)
    row_losses = mixture_loss(log_g, batch.expert_answers, batch.y, config.loss)  # (clients, B)
    losses = (row_losses * batch.present).sum(1) / batch.present.sum(1)
    if config.load_loss:
        losses = losses + config.load_loss * load_loss(log_g.exp(), batch.present)
    return losses


def _step(theta: State, gradients: Sequence[Tensor], rate: float, config: GateConfig) -> Mapping[str, Tensor]:
    """The stacked weights after one gradient step of every client; gradients in the order of theta."""
    steps = _step_sizes([gradient.flatten(1) for gradient in gradients], rate, config)  # (clients,)
    after = {}
    for (key, value), gradient in zip(theta.items(), gradients, strict=True):
        step = steps.view(-1, *[1] * (gradient.ndim - 1))  # (clients, 1, …)
        after[key] = value.detach() - step * gradient
    return after


def _step_sizes(gradients: Sequence[Tensor], rate: float, config: GateConfig) -> Tensor:
    """Each client's step size under gradient normalisation, from the parts of its gradient (clients, …). -> (clients,)

    gate.step "unit" makes every step as long as the rate; "clipped" only shortens gradients that are longer than 1.
    """
    length = torch.cat(list(gradients), 1).norm(dim=1)
    return rate / (length + 1e-12) if config.step == "unit" else rate / length.clamp(min=1)


def rollgate_stop(
    net: Gate, gates: Sequence[State], data: Sequence[GateSamples], stop: int, seed: int, config: GateConfig
) -> tuple[list[State], Round]:
    """One stop of RollGate: one client trains the gate for an epoch on its own latents and passes it on."""
    experts = len(data)
    stops = config.laps * experts
    client = client_at(stop, experts, seed, config)
    h = data[client].latents
    g = generator(seed, "rollgate", stop, client)
    labels = _pseudo_labels(client, len(h), experts, config.roll_own, g)
    gate = dict(gates[0])
    trained = sorted(_shared_part(gate))
    rate = config.rate * cosine(stop, stops)
    loss_sum = 0.0
    correct = 0
    for batch in torch.randperm(len(h), generator=g).split(config.batch):
        theta = {key: value.detach().requires_grad_(key in trained) for key, value in gate.items()}
        scores = functional_call(net, theta, (h[batch],))  # (B, N)
        loss = cross_entropy(scores, labels[batch])
        gradients = torch.autograd.grad(loss, [theta[key] for key in trained])
        step = _step_sizes([gradient.flatten()[None] for gradient in gradients], rate, config)  # (1,)
        for key, gradient in zip(trained, gradients, strict=True):
            gate[key] = gate[key] - step * gradient
        loss_sum += loss.item() * len(batch)
        correct += int((scores.argmax(1) == labels[batch]).sum())
    update = Update(client, gate, len(h), loss_sum / len(h), correct / len(h))
    require_finite("gate", stop, [update])
    summary = report("gate", stop, stops, [update], payload_bytes=size_bytes(_shared_part(gate)))
    return [gate] * experts, summary


def _pseudo_labels(client: int, rows: int, experts: int, own_share: float, g: torch.Generator) -> Tensor:
    """RollGate's labels: this client with probability `own_share`, else any other client with equal chances. (rows,)"""
    others = torch.randint(0, experts - 1, (rows,), generator=g)
    others = others + (others >= client)
    return torch.where(torch.rand(rows, generator=g) < own_share, client, others)


def client_at(stop: int, clients: int, seed: int, config: GateConfig) -> int:
    """The client at a stop of RollGate: each once per lap, in ascending order ("ring") or in a new order per lap."""
    lap, position = divmod(stop, clients)
    if config.order == "ring":
        return position
    return int(torch.randperm(clients, generator=generator(seed, "order", lap))[position])
