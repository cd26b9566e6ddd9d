"""Stage 1: the shared feature extractor F, supervised (FedCE) or self-supervised (FedSC).

    FedCE   min over F, H of  Σᵢ qᵢ · CE(H(F(x)), y)
    FedSC   min over F, P of  Σᵢ qᵢ · ( -2 tr(Rᵢ⁺) + α tr(Rᵢ²) + 2 (1-α) tr(Rᵢ Cᵢ) ),   R = E[z zᵀ], z = P(F(x))

Every client takes a few epochs of SGD on its own samples; the server averages by client size, qᵢ = nᵢ/n. FedCE trains
a whole classifier and takes its head H off afterwards (or leaves it with its client all the while). FedSC needs no
label: two views of an image shall agree, and correlate as little as can be with all others', those of other clients
too, which it knows only by Cᵢ, the mean of their correlation matrices. Those are what may be protected by noise; the
weights that are averaged are not. Its projector P is thrown away.
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
    attending,
    average,
    check,
    cosine,
    generator,
    report,
    size,
)
from nmoe_train.stages.losses import correlation, of_the_others, shortened, spectral_loss
from nmoe_train.stages.privacy import noise_for, spent

Data = Sequence[tuple[Tensor, Tensor]]
"""Of each client x (n, C, H, W) uint8 and y (n,)."""
BatchLoss = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor | None]]
"""(the network, the batch's indices) -> its mean loss, and how many it got right where that is a question."""
ENCODE_BATCH = 512


class Headed(nn.Module):
    """H∘F: on the extractor a classifier's head, or FedSC's projector."""

    def __init__(self, extractor: nn.Module, head: nn.Module) -> None:
        """F and H."""
        super().__init__()
        self.extractor, self.head = extractor, head

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
) -> Update:
    """A client's local epochs from `state`; one that has more than step_limit batches sends what it has by then."""
    _learning(net)
    theta = {key: value.clone() for key, value in state.items()}
    learned = [theta[key].requires_grad_() for key, p in net.named_parameters() if p.requires_grad]
    device = learned[0].device
    optimiser = torch.optim.SGD(learned, rate, momentum=config.momentum, weight_decay=config.weight_decay)
    losses, hits, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    labelled = False
    with torch.random.fork_rng():  # for Dropout, which knows no generator of its own
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))
        for batch in islice(_batches(samples, config, g), config.step_limit):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value, right = loss(lambda x: functional_call(net, theta, (x,)), batch.to(device))
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(learned, config.clip)
            optimiser.step()
            losses, seen = losses + value.detach() * len(batch), seen + len(batch)
            if right is not None:
                hits, labelled = hits + right, True
    accuracy = hits.item() / seen if labelled else None
    after = {key: value.detach() for key, value in theta.items()}
    return Update(client, after, samples, losses.item() / max(1, seen), accuracy)


def fedce_update(
    net: nn.Module,
    state: State,
    client: int,
    x: Tensor,
    y: Tensor,
    rate: float,
    config: ExtractorConfig,
    g: torch.Generator,
) -> Update:
    """A client's epochs of cross-entropy."""
    view = VIEWS.get(config.views, lambda x, _g: x)

    def loss(f: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = f(view(x[batch], g))
        return cross_entropy(logits, y[batch]), (logits.detach().argmax(1) == y[batch]).sum()

    return local_sgd(net, state, client, len(x), loss, rate, config, g)


def fedce_round(
    net: nn.Module, states: Sequence[State], data: Data, round_: int, seed: int, config: ExtractorConfig
) -> tuple[list[State], Round]:
    """One round: every client's classifier before -> after."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    here, lost = attending(len(data), config.share, config.drop, seed, "extractor", round_)
    updates = [
        fedce_update(net, states[i], i, *data[i], rate, config, generator(seed, "extractor", round_, i)) for i in here
    ]
    check("extractor", round_, updates)
    local = config.heads == "local"
    sent = size({key: value for key, value in states[0].items() if not (local and key.startswith("head."))})
    told = report("extractor", round_, config.rounds, updates, lost, sent)
    if not updates:
        return list(states), told
    shared = average(updates)
    if not local:
        return [shared] * len(data), told
    heads = {update.client: update.state for update in updates}
    return [
        {key: heads.get(i, states[i])[key] if key.startswith("head.") else value for key, value in shared.items()}
        for i in range(len(data))
    ], told


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
    """A client's epochs of the spectral loss, both views in one pass."""
    view = VIEWS[fedsc.views]

    def loss(f: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, None]:
        images = x[batch]
        z = shortened(f(torch.cat([view(images, g), view(images, g)])).float(), fedsc.radius)
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
    """One round: correlation matrices of the shared network, then every client's update."""
    rate = config.rate * cosine(round_, config.rounds, config.warm_rounds)
    alpha = 1 - (1 - fedsc.alpha) * round_ / max(1, config.rounds - 1)
    here, lost = attending(len(data), config.share, config.drop, seed, "extractor", round_)
    sizes, shield = [len(x) for x, _ in data], Shield([len(x) for x, _ in data], config, fedsc)
    matrices = [
        shield.released(
            i,
            matrix(net, states[i], data[i][0], fedsc, generator(seed, "matrix", round_, i)),
            generator(seed, "noise", round_, i),
        )
        for i in here
    ]
    others = of_the_others(matrices, [sizes[i] for i in here])
    updates = [
        fedsc_update(
            net, states[i], i, data[i][0], c, alpha, rate, config, fedsc, generator(seed, "extractor", round_, i)
        )
        for i, c in zip(here, others, strict=True)
    ]
    check("extractor", round_, updates)
    sent = size(states[0]) + (size({"C": others[0]}) if others else 0)
    told = report(
        "extractor", round_, min(config.rounds, shield.rounds), updates, lost, sent, epsilon=shield.spent(round_ + 1)
    )
    return [average(updates)] * len(data) if updates else list(states), told


def matrix(net: nn.Module, state: State, x: Tensor, fedsc: FedSCConfig, g: torch.Generator) -> Tensor:
    """A client's R: the mean of z zᵀ over several views of each of its samples. (n, C, H, W) -> (d, d)"""
    net.eval()
    total: Tensor | float = 0.0
    with torch.no_grad():
        for _ in range(fedsc.matrix_views):
            for part in x.split(ENCODE_BATCH):
                z = functional_call(net, dict(state), (VIEWS[fedsc.views](part, g),)).float()
                total = total + correlation(shortened(z, fedsc.radius)) * (len(part) / len(x))
    return total / fedsc.matrix_views


class Shield:
    """Gaussian noise for the matrices, and what their releases cost the client whom they cost most.

    A sample that is replaced by another moves R by at most √2 μ/n in Frobenius norm, since zzᵀ and z'z'ᵀ are no longer
    than μ and at right angles at most. Every client is counted as releasing in every round, also when it was not there.
    The noise comes of the run's seed, so that a simulation can be repeated: clients of flesh and blood draw their own.
    """

    def __init__(self, sizes: Sequence[int], config: ExtractorConfig, fedsc: FedSCConfig) -> None:
        """sizes: samples of each client"""
        self._sensitivities, self._delta = [math.sqrt(2) * fedsc.radius / n for n in sizes], fedsc.delta
        if fedsc.sigma is not None:
            self.sigmas = [fedsc.sigma] * len(sizes)
        elif fedsc.epsilon is not None:
            self.sigmas = [noise_for(fedsc.epsilon, s, config.rounds, fedsc.delta) for s in self._sensitivities]
        else:
            self.sigmas = [0.0] * len(sizes)
        self.rounds = config.rounds
        """How many the budget allows."""
        if fedsc.sigma and fedsc.epsilon is not None:
            single = max(noise_for(fedsc.epsilon, s, 1, fedsc.delta) for s in self._sensitivities)
            self.rounds = min(config.rounds, int((fedsc.sigma / single) ** 2 * (1 + 1e-9)))

    def spent(self, releases: int) -> float | None:
        """ε of so many releases; None without noise, which is no protection."""
        if not any(self.sigmas):
            return None
        return max(
            spent(s, sigma, releases, self._delta) for s, sigma in zip(self._sensitivities, self.sigmas, strict=True)
        )

    def released(self, client: int, r: Tensor, g: torch.Generator) -> Tensor:
        """A matrix as the others get it: with noise, and symmetric."""
        noise = torch.randn(r.shape, generator=g).to(r.device) * self.sigmas[client]
        return r + (noise + noise.T) / 2


def _batches(samples: int, config: ExtractorConfig, g: torch.Generator) -> Iterator[Tensor]:
    """Indices of every local epoch's batches; a single row that is left over joins the batch before it."""
    for _ in range(config.local_epochs):
        parts = list(torch.randperm(samples, generator=g).split(config.batch))
        if len(parts) > 1 and len(parts[-1]) == 1:  # BatchNorm has no statistics of one row
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def _learning(net: nn.Module) -> None:
    """Train mode, apart from layers that are frozen: their statistics stand too."""
    net.train()
    for layer in net.modules():
        own = list(layer.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            layer.eval()
