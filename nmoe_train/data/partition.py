"""Partitions: how the classes of a data set are distributed among the clients (setting data.partition).

    iid              every client has every class equally often
    noniid:TAU       client c's dominant class, c mod K, has the share 1/(1+τ); its other classes share the rest equally
    noniid-text:TAU  the same with the share 1-τ
    dirichlet:A      each client's class mix is drawn from the Dirichlet distribution with all parameters A
    classes:C        each client has C of the K classes, equally often

The paper's text defines its non-IID setup by 1-τ, but its tables come from 1/(1+τ): a local classifier that always
answers the dominant class reaches 66.66 % for τ = 0.5. That is why noniid is the default and noniid-text the variant.

All clients get the same number of samples, and no sample goes to two clients. This module works on labels alone;
clients.py applies the result to images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from nmoe_train.errors import DataError

Indices = NDArray[np.int64]
Shares = NDArray[np.float64]
"""Class mixes (clients, K): each row is one client's share of every class and sums to 1."""
_MAX_QUOTED = 80
"""Characters of a wrong partition that an error message quotes."""


def class_counts(partition: str, clients: int, classes: int, size: int, seed: int) -> NDArray[np.int64]:
    """The number of samples of each class for each client (clients, K); every row sums to `size`."""
    return _apportion(_class_mixes(partition, clients, classes, seed), size)


def draw_samples(y: NDArray[np.int64], counts: NDArray[np.int64], seed: int) -> list[Indices]:
    """Each client's samples as shuffled indices into `y`, with as many of each class as `counts` (clients, K) says."""
    _check_supply(y, counts)
    draw = np.random.default_rng([seed, 2])
    decks = [draw.permutation(np.flatnonzero(y == label)) for label in range(counts.shape[1])]
    ends = counts.cumsum(0)
    starts = ends - counts
    parts = []
    for client in range(len(counts)):
        cuts = zip(decks, starts[client], ends[client], strict=True)
        parts.append(np.concatenate([deck[start:end] for deck, start, end in cuts]))
    return [draw.permutation(part) for part in parts]


def largest_size(
    y: NDArray[np.int64],
    partition: str,
    clients: int,
    classes: int,
    seed: int,
    max_size: int | None = None,
    part: str = "training",
) -> int:
    """The largest number of samples per client, at most `max_size`, for which the labels `y` suffice.

    part: what the samples are, for the error message

    DataError: not even 2 samples per client are possible.
    """
    shares = _class_mixes(partition, clients, classes, seed)
    available = np.bincount(y, minlength=classes)
    low = 0
    high = len(y) // clients if max_size is None else min(max_size, len(y) // clients)
    size = high  # try the maximum first: because of rounding a size may fit even where a smaller one does not
    while low < high:
        fits = (_apportion(shares, size).sum(0) <= available).all()
        if fits:
            low = size
        else:
            high = size - 1
        size = (low + high + 1) // 2
    if low < 2:
        scarcest = (_apportion(shares, 2).sum(0) - available).argmax()
        raise DataError(
            f"{partition} among {clients} clients leaves {low} of {len(y)} {part} samples per client; at least 2 are"
            f" needed (class {scarcest} has {available[scarcest]}). Lower data.clients, or choose a less skewed"
            " data.partition"
        )
    return low


def counts_for_size(
    y: NDArray[np.int64],
    partition: str,
    clients: int,
    classes: int,
    wanted: int | None,
    usual: int | None,
    seed: int,
    part: str = "training",
) -> NDArray[np.int64]:
    """class_counts() for `wanted` samples per client; if that is None, for the largest possible size up to `usual`.

    part: what the samples are, "training" or "test", for error messages
    """
    size = largest_size(y, partition, clients, classes, seed, usual, part) if wanted is None else wanted
    counts = class_counts(partition, clients, classes, size, seed)
    _check_supply(y, counts, part)
    return counts


def _check_supply(y: NDArray[np.int64], counts: NDArray[np.int64], part: str = "training") -> None:
    available = np.bincount(y, minlength=counts.shape[1])
    needed = counts.sum(0)
    if (needed > available).any():
        label = (needed - available).argmax()
        raise DataError(
            f"the partition needs {needed[label]} {part} samples of class {label}, but there are {available[label]}; "
            f"lower data.{part.removesuffix('ing')}_size or data.clients"
        )


def _class_mixes(partition: str, clients: int, classes: int, seed: int) -> Shares:
    kind, _, text = partition.partition(":")
    takes_number = kind != "iid"
    if kind not in _SHARES or bool(text) != takes_number:
        likely = (kind, *get_close_matches(kind, _SHARES, 1))
        matching = [example for example in EXAMPLES if example.partition(":")[0] in likely]
        hint = f"did you mean {matching[0]}?" if matching else f"expected one of {', '.join(EXAMPLES)}"
        raise DataError(f"unknown partition {partition[:_MAX_QUOTED]!r}; {hint}")
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"partition {partition[:_MAX_QUOTED]!r} does not end in a finite number; "
            f"expected one of {', '.join(EXAMPLES)}"
        )
    return _SHARES[kind](value, clients, classes, np.random.default_rng([seed, 1]))


def _apportion(shares: Shares, size: int) -> NDArray[np.int64]:
    """Whole numbers close to shares · size, every row summing to `size`. (clients, K) -> (clients, K)

    All entries are rounded down first. The samples still missing go to the classes that lost most by rounding; ties
    are broken in an order that starts at another class for each client, so that no class gets all the remainders.
    """
    clients, classes = shares.shape
    exact = shares * size
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = (np.arange(classes) + np.arange(1, clients + 1)[:, None]) % classes  # client c: c+1, c+2, …
    lost = np.take_along_axis(np.round(exact - counts, 9), order, 1)
    order = np.take_along_axis(order, np.argsort(-lost, axis=1, kind="stable"), 1)
    gets_one_more = np.arange(classes) < (size - counts.sum(1))[:, None]
    counts[np.nonzero(gets_one_more)[0], order[gets_one_more]] += 1
    return counts


def _iid(_value: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    return np.full((clients, classes), 1 / classes)


def _dominated(share: float, clients: int, classes: int) -> Shares:
    if not 0 < share <= 1:
        raise DataError(f"the dominant class would have the share {share:.3g}; it must be over 0 and at most 1")
    shares = np.full((clients, classes), (1 - share) / (classes - 1))
    shares[np.arange(clients), np.arange(clients) % classes] = share
    return shares


def _noniid(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    _check_tau("noniid", tau)
    return _dominated(1 / (1 + tau), clients, classes)


def _noniid_text(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    _check_tau("noniid-text", tau)
    return _dominated(1 - tau, clients, classes)


def _check_tau(kind: str, tau: float) -> None:
    if not 0 <= tau <= 1:
        raise DataError(
            f"{kind}:{tau:.3g}: τ must be in 0..1; the paper's share of the own class, 1-τ, has no meaning outside."
            " For milder skew take iid or dirichlet:A with a large A"
        )


def _dirichlet(alpha: float, clients: int, classes: int, draw: np.random.Generator) -> Shares:
    """Normalised gamma variables, computed as logarithms: for a small α a whole row would underflow to zero."""
    if not 1e-6 <= alpha <= 1e6:
        raise DataError(f"dirichlet:{alpha:.3g}: the number must lie in 1e-6..1e6")
    size = (clients, classes)
    # Γ(α) is distributed as Γ(α+1) · U^(1/α) (Marsaglia and Tsang 2000, section 6).
    logs = np.log(draw.standard_gamma(alpha + 1, size)) + np.log1p(-draw.random(size)) / alpha
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _classes(count: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    if count != int(count) or not 1 <= count <= classes:
        raise DataError(f"classes:{count:.3g}: the number of classes per client must be a whole number in 1..{classes}")
    shares = np.zeros((clients, classes))
    for client in range(clients):
        shares[client, (client + np.arange(int(count))) % classes] = 1 / count
    return shares


_SHARES: dict[str, Callable[[float, int, int, np.random.Generator], Shares]] = {
    "iid": _iid,
    "noniid": _noniid,
    "noniid-text": _noniid_text,
    "dirichlet": _dirichlet,
    "classes": _classes,
}
EXAMPLES = ("iid", "noniid:0.5", "noniid-text:0.5", "dirichlet:0.3", "classes:2")
