"""Stage 1: the shared feature extractor F, trained with labels (FedCE) or without (FedSC).

FedCE (federated cross-entropy) trains a whole classifier H∘F by FedAvg; afterwards its shallow layers F are the
extractor and its head H is the predictor:

    min over F, H   Σᵢ qᵢ · CE(H(F(x)), y)          qᵢ = nᵢ / Σⱼ nⱼ, client i's share of all samples

FedSC (federated spectral contrastive learning) needs no labels. It pulls two views x, x⁺ of one image together and
pushes different images apart, those of other clients too:

    min over F, P   Σᵢ qᵢ · ( -2 tr(Rᵢ⁺) + α tr(Rᵢ²) + 2 (1-α) tr(Rᵢ R̄₋ᵢ) )

    z = P(F(x)), cut to length √μ       P: a projector, discarded after this stage
    Rᵢ⁺ = E[z z⁺ᵀ],  Rᵢ = E[z zᵀ]        client i's correlation matrices
    R̄₋ᵢ                                 the mean of Rⱼ over the other clients, which the server computes

With extractor.loss = "adjusted" FedCE trains on CE(H(F(x)) + log πᵢ, y) instead, where πᵢ is the client's own class mix
(logit adjustment). Clients with different classes then pull the shared head less far apart.

In every round each client takes some epochs of SGD on its own samples, and the server averages the weights by qᵢ.

Where this deviates from the paper:

- FedCE averages the head as well unless extractor.heads = "local". The paper's equation (2) keeps a head per client;
  its text also trains the entire classifier by FedAvg, and a shared head is what experts start from.
- FedSC's loss is twice equation (4). α is qᵢ only with fedsc.own_weight = "share"; by default it falls from 1 in the
  first round to fedsc.alpha in the last. While α is 1 the other clients' matrices, and their noise, count for nothing.
- FedSC uses a projector and cuts z to length √μ. The cut bounds what one sample adds to a released matrix, as
  differential privacy requires. Only the matrices are protected; the averaged weights are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from nmoe_train.config import ExtractorConfig, FedSCConfig
from nmoe_train.data.views import VIEWS
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
)
from nmoe_train.stages.losses import cap_length, class_prior, correlation, means_of_others, spectral_loss
from nmoe_train.stages.privacy import epsilon_spent, noise_for

Data = Sequence[tuple[Tensor, Tensor]]
"""Each client's images (n, C, H, W) uint8 and labels (n,)."""
BatchLoss = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor | None]]
"""(network, indices of the batch) -> (mean loss, number of rows classified correctly; None without labels)."""
AdjustGradients = Callable[[Sequence[Tensor]], None]
"""Gets the trained weights of a client before every step, and may change their gradients in place."""
ENCODE_BATCH = 512


class Headed(nn.Module):
    """An extractor with a head on top, H∘F: FedCE's classifier or FedSC's projector."""

    def __init__(self, extractor: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)"""
        return self.head(self.extractor(x))


def local_sgd(
    net: nn.Module,
    state: State,
    client: int,
    samples: int,
    loss: BatchLoss,
    rate: float,
    config: ExtractorConfig,
    g: torch.Generator,
    adjust_gradients: AdjustGradients = lambda _: None,
) -> Update:
    """One client's local epochs of SGD, starting from `state`; at most extractor.step_limit batches."""
    _train_mode(net)
    theta = {key: value.clone(memory_format=_memory_format(value)) for key, value in state.items()}
    trained = [theta[key].requires_grad_() for key, p in net.named_parameters() if p.requires_grad]
    device = trained[0].device
    bfloat16 = device.type == "cuda" if config.precision == "auto" else config.precision == "bfloat16"
    optimiser = torch.optim.SGD(trained, rate, momentum=config.momentum, weight_decay=config.weight_decay)
    loss_sum = torch.zeros((), device=device)
    correct_sum = torch.zeros((), device=device)
    rows = 0
    has_labels = False
    with torch.random.fork_rng():  # Dropout takes no generator, so it gets the global one, seeded for this client
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))
        for batch in islice(_batches(samples, config, g), config.step_limit):
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                value, correct = loss(lambda x: functional_call(net, theta, (x,)), batch.to(device))
            optimiser.zero_grad()
            value.backward()
            adjust_gradients(trained)
            nn.utils.clip_grad_norm_(trained, config.clip)
            optimiser.step()
            loss_sum = loss_sum + value.detach() * len(batch)
            rows += len(batch)
            if correct is not None:
                correct_sum = correct_sum + correct
                has_labels = True
    accuracy = correct_sum.item() / rows if has_labels else None
    after = {key: value.detach() for key, value in theta.items()}
    return Update(client, after, samples, loss_sum.item() / max(1, rows), accuracy)


def _memory_format(value: Tensor) -> torch.memory_format:
    """Convolutions are faster with channels last."""
    return torch.channels_last if value.ndim == 4 else torch.preserve_format


def fedce_update(
    net: nn.Module,
    state: State,
    client: int,
    x: Tensor,
    y: Tensor,
    rate: float,
    config: ExtractorConfig,
    g: torch.Generator,
    adjust_gradients: AdjustGradients = lambda _: None,
) -> Update:
    """FedCE on one client: epochs of cross-entropy on its own labelled images."""
    view = VIEWS.get(config.views, lambda images, _g: images)

    def loss(network: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(view(x[batch], g))  # (B, K)
        if config.loss == "adjusted":
            logits = logits + class_prior(y, logits.shape[1]).log()
        correct = (logits.detach().argmax(1) == y[batch]).sum()
        return cross_entropy(logits, y[batch]), correct

    return local_sgd(net, state, client, len(x), loss, rate, config, g, adjust_gradients)


def fedce_round(
    net: nn.Module, states: Sequence[State], data: Data, round_: int, seed: int, config: ExtractorConfig
) -> tuple[list[State], Round]:
    """One round of FedCE: every client's classifier before -> after."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    active, dropped = active_clients(len(data), config.share, config.drop, seed, "extractor", round_)
    updates = [
        fedce_update(net, states[i], i, *data[i], rate, config, generator(seed, "extractor", round_, i)) for i in active
    ]
    require_finite("extractor", round_, updates)
    heads_stay = config.heads == "local"
    sent = {key: value for key, value in states[0].items() if not (heads_stay and _in_head(key))}
    summary = report("extractor", round_, config.rounds, updates, dropped, size_bytes(sent))
    if not updates:
        return list(states), summary
    shared = average(updates)
    if not heads_stay:
        return [shared] * len(data), summary
    latest = dict(enumerate(states)) | {update.client: update.state for update in updates}
    return [_with_own_head(shared, latest[i]) for i in range(len(data))], summary


def _in_head(key: str) -> bool:
    return key.startswith("head.")


def _with_own_head(shared: State, own: State) -> State:
    """The shared extractor with a client's own head."""
    return {key: own[key] if _in_head(key) else value for key, value in shared.items()}


def fedsc_update(
    net: nn.Module,
    state: State,
    client: int,
    x: Tensor,
    others: Tensor,
    alpha: float,
    rate: float,
    config: ExtractorConfig,
    fedsc: FedSCConfig,
    g: torch.Generator,
) -> Update:
    """FedSC on one client: epochs of the spectral loss on its own images, both views in one forward pass."""
    view = VIEWS[fedsc.views]

    def loss(network: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, None]:
        images = x[batch]
        both = torch.cat([view(images, g), view(images, g)])  # (2B, C, H, W)
        z = cap_length(network(both).float(), fedsc.radius)  # (2B, d)
        return spectral_loss(*z.chunk(2), alpha, others), None

    return local_sgd(net, state, client, len(x), loss, rate, config, g)


def fedsc_round(
    net: nn.Module,
    states: Sequence[State],
    data: Data,
    round_: int,
    seed: int,
    config: ExtractorConfig,
    fedsc: FedSCConfig,
) -> tuple[list[State], Round]:
    """One round of FedSC: clients publish the correlation matrices of the shared network, then train on their own."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    active, dropped = active_clients(len(data), config.share, config.drop, seed, "extractor", round_)
    sizes = [len(x) for x, _ in data]
    noise = MatrixNoise(sizes, config, fedsc)
    matrices = []
    for i in active:
        r = matrix(net, states[i], data[i][0], fedsc, generator(seed, "matrix", round_, i))
        matrices.append(noise.apply(i, r, generator(seed, "noise", round_, i)))
    others = means_of_others(matrices, [sizes[i] for i in active])
    updates = []
    for i, mean in zip(active, others, strict=True):
        g = generator(seed, "extractor", round_, i)
        alpha = _own_weight(sizes[i] / sum(sizes), round_, config.rounds, fedsc)
        updates.append(fedsc_update(net, states[i], i, data[i][0], mean, alpha, rate, config, fedsc, g))
    require_finite("extractor", round_, updates)
    matrix_bytes = size_bytes({"R": others[0]}) if others else 0
    summary = report(
        "extractor",
        round_,
        min(config.rounds, noise.rounds),
        updates,
        dropped,
        size_bytes(states[0]) + matrix_bytes,
        epsilon=noise.epsilon_after(round_ + 1),
    )
    after = [average(updates)] * len(data) if updates else list(states)
    return after, summary


def _own_weight(share: float, round_: int, rounds: int, fedsc: FedSCConfig) -> float:
    """α of a client with this share of all samples."""
    if fedsc.own_weight == "share":
        return share
    return 1 - (1 - fedsc.alpha) * round_ / max(1, rounds - 1)


def matrix(net: nn.Module, state: State, x: Tensor, fedsc: FedSCConfig, g: torch.Generator) -> Tensor:
    """A client's R: the mean of z zᵀ over its samples, fedsc.matrix_views views of each. (n, C, H, W) -> (d, d)"""
    net.eval()
    view = VIEWS[fedsc.views]
    total: Tensor | float = 0.0
    with torch.no_grad():
        for _ in range(fedsc.matrix_views):
            for images in x.split(ENCODE_BATCH):
                z = functional_call(net, dict(state), (view(images, g),)).float()  # (B, d)
                total = total + correlation(cap_length(z, fedsc.radius)) * (len(images) / len(x))
    return total / fedsc.matrix_views


class MatrixNoise:
    """Differential privacy for the matrices: adds Gaussian noise to them and accounts for ε.

    Replacing one sample moves R by at most √2 μ/n in Frobenius norm: zzᵀ and z'z'ᵀ have norm at most μ, and the angle
    between them is at most 90°. The budget counts a release for every client in every round, even if the client did not
    take part, and ε is that of the client that spends most. The noise comes from the run's seed so that a simulation
    can be repeated; real clients must draw their own.
    """

    def __init__(self, sizes: Sequence[int], config: ExtractorConfig, fedsc: FedSCConfig) -> None:
        """sizes: training samples of each client"""
        self._sensitivities = [math.sqrt(2) * fedsc.radius / n for n in sizes]
        self._delta = fedsc.delta
        if fedsc.sigma is not None:
            self.sigmas = [fedsc.sigma] * len(sizes)
        elif fedsc.epsilon is not None:
            self.sigmas = [noise_for(fedsc.epsilon, s, config.rounds, fedsc.delta) for s in self._sensitivities]
        else:
            self.sigmas = [0.0] * len(sizes)
        self.rounds = config.rounds
        """Number of rounds that the budget allows"""
        if fedsc.sigma is not None and fedsc.epsilon is not None:
            # ε depends on √T · Δ/σ alone: σ allows (σ/σ₁)² releases, where σ₁ is the noise that allows one.
            sigma_for_one = max(noise_for(fedsc.epsilon, s, 1, fedsc.delta) for s in self._sensitivities)
            allowed = int((fedsc.sigma / sigma_for_one) ** 2 * (1 + 1e-9))
            self.rounds = min(config.rounds, allowed)

    def epsilon_after(self, releases: int) -> float | None:
        """ε after this many releases; None without noise, which protects nothing."""
        if not any(self.sigmas):
            return None
        clients = zip(self._sensitivities, self.sigmas, strict=True)
        return max(epsilon_spent(sensitivity, sigma, releases, self._delta) for sensitivity, sigma in clients)

    def apply(self, client: int, r: Tensor, g: torch.Generator) -> Tensor:
        """The matrix that a client publishes: R plus symmetric noise. (d, d) -> (d, d)"""
        noise = torch.randn(r.shape, generator=g).to(r.device) * self.sigmas[client]
        return r + (noise + noise.T) / 2


def _batches(samples: int, config: ExtractorConfig, g: torch.Generator) -> Iterator[Tensor]:
    """Indices of each batch of every local epoch. A last batch of one row joins the batch before it."""
    for _ in range(config.local_epochs):
        batches = list(torch.randperm(samples, generator=g).split(config.batch))
        if len(batches) > 1 and len(batches[-1]) == 1:  # BatchNorm cannot compute statistics of one row
            single = batches.pop()
            batches[-1] = torch.cat([batches[-1], single])
        yield from batches


def steps_of_round(samples: int, config: ExtractorConfig) -> int:
    """Gradient steps of a client in one round."""
    steps = sum(1 for _ in _batches(samples, config, torch.Generator()))
    return steps if config.step_limit is None else min(steps, config.step_limit)


def _train_mode(net: nn.Module) -> None:
    """Training mode, except for frozen layers: the statistics of a frozen BatchNorm stay fixed too."""
    net.train()
    for layer in net.modules():
        own = list(layer.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            layer.eval()
