"""Who has which samples: the split of a data set among the clients.

    iid              every client draws alike
    noniid:TAU       client c has a dominant class, c mod classes, with the share 1/(1+τ), and the others evenly
    noniid-text:TAU  the same with the share 1−τ, as the paper's text has it; its tables have the other
    dirichlet:A      each client's class mix is a draw from Dirichlet(A)
    classes:C        each client has C classes, evenly

Every client gets as many samples as any other. Train and test are split alike. Nobody shares a sample with anybody.
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
"""(clients, classes): how much of each class a client has, each row a class mix that sums to 1."""


def class_counts(partition: str, clients: int, classes: int, size: int, seed: int) -> NDArray[np.int64]:
    """How many samples of each class each client is due: (clients, classes), every row summing to `size`."""
    return _apportion(_class_mixes(partition, clients, classes, seed), size)


def split(y: NDArray[np.int64], counts: NDArray[np.int64], seed: int) -> list[Indices]:
    """Deal the samples out as `counts` says, nobody's twice; each client's indices in random order."""
    _check_supply(y, counts)
    draw = np.random.default_rng([seed, 2])
    decks = [draw.permutation(np.flatnonzero(y == label)) for label in range(counts.shape[1])]
    ends = counts.cumsum(0)
    parts = [
        np.concatenate([deck[end - n : end] for deck, end, n in zip(decks, ends[c], counts[c], strict=True)])
        for c in range(len(counts))
    ]
    return [draw.permutation(part) for part in parts]


def largest_size(
    y: NDArray[np.int64], partition: str, clients: int, classes: int, seed: int, most: int | None = None
) -> int:
    """The most samples a client can have in this split, and not over `most`."""
    shares = _class_mixes(partition, clients, classes, seed)
    available = np.bincount(y, minlength=classes)
    low, high = 0, len(y) // clients if most is None else min(most, len(y) // clients)
    size = high  # which is tried first: rounding lets a size fit where a smaller one does not
    while low < high:
        fits = (_apportion(shares, size).sum(0) <= available).all()
        low, high = (size, high) if fits else (low, size - 1)
        size = (low + high + 1) // 2
    if low < 2:
        label = (_apportion(shares, 2).sum(0) - available).argmax()
        raise DataError(
            f"{partition} among {clients} clients leaves each {low} of {len(y)} samples, fewer than 2 "
            f"(class {label} has {available[label]}): take fewer data.clients, or a split that is less skewed"
        )
    return low


def sized(
    y: NDArray[np.int64],
    partition: str,
    clients: int,
    classes: int,
    wanted: int | None,
    usual: int | None,
    seed: int,
) -> NDArray[np.int64]:
    """class_counts() with `wanted` samples a client; without that as many as there can be, but not over `usual`."""
    size = largest_size(y, partition, clients, classes, seed, usual) if wanted is None else wanted
    counts = class_counts(partition, clients, classes, size, seed)
    _check_supply(y, counts)
    return counts


def _check_supply(y: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    available, due = np.bincount(y, minlength=counts.shape[1]), counts.sum(0)
    if (due > available).any():
        label = (due - available).argmax()
        raise DataError(
            f"the split needs {due[label]} samples of class {label}, but there are {available[label]}: "
            "take a smaller data.train_size or data.test_size, or fewer data.clients"
        )


def _class_mixes(partition: str, clients: int, classes: int, seed: int) -> Shares:
    kind, _, text = partition.partition(":")
    if kind not in _SHARES or bool(text) == (kind == "iid"):
        example = [e for e in EXAMPLES if e.partition(":")[0] in (kind, *get_close_matches(kind, _SHARES, 1))]
        hint = f"did you mean {example[0]}?" if example else f"there are {', '.join(EXAMPLES)}"
        raise DataError(f"no split is called {partition[:80]!r}; {hint}")
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{partition[:80]!r} ends in no finite number; there are {', '.join(EXAMPLES)}")
    return _SHARES[kind](value, clients, classes, np.random.default_rng([seed, 1]))


def _apportion(shares: Shares, size: int) -> NDArray[np.int64]:
    """Whole numbers nearest to `shares` of `size`; what rounding leaves goes round from a client's own class on."""
    clients, classes = shares.shape
    exact = shares * size
    counts = np.floor(exact + 1e-9).astype(np.int64)
    # So that the clients' remainders fall on different classes: client c prefers class c+1, then c+2, …
    order = (np.arange(classes) + np.arange(1, clients + 1)[:, None]) % classes
    lost = np.take_along_axis(np.round(exact - counts, 9), order, 1)
    order = np.take_along_axis(order, np.argsort(-lost, axis=1, kind="stable"), 1)
    left = np.arange(classes) < (size - counts.sum(1))[:, None]
    counts[np.nonzero(left)[0], order[left]] += 1
    return counts


def _iid(_value: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    return np.full((clients, classes), 1 / classes)


def _dominated(share: float, clients: int, classes: int) -> Shares:
    if not 0 < share <= 1:
        raise DataError(f"a dominant share of {share:.3g} is not in 0..1")
    shares = np.full((clients, classes), (1 - share) / (classes - 1))
    shares[np.arange(clients), np.arange(clients) % classes] = share
    return shares


def _noniid(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    if tau < 0:
        raise DataError(f"τ is {tau:.3g}, less than 0")
    return _dominated(1 / (1 + tau), clients, classes)


def _noniid_text(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    return _dominated(1 - tau, clients, classes)


def _dirichlet(alpha: float, clients: int, classes: int, draw: np.random.Generator) -> Shares:
    """Gamma variables over their sum, kept as logarithms: with a small α all of a row would be 0 otherwise."""
    if not 1e-6 <= alpha <= 1e6:
        raise DataError(f"a Dirichlet split needs a number over 0, from 1e-6 to 1e6, not {alpha:.3g}")
    size = (clients, classes)
    # Γ(α) is Γ(α+1) · U^(1/α) (Marsaglia and Tsang 2000, section 6).
    logs = np.log(draw.standard_gamma(alpha + 1, size)) + np.log1p(-draw.random(size)) / alpha
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _classes(count: float, clients: int, classes: int, _draw: np.random.Generator) -> Shares:
    if count != int(count) or not 1 <= count <= classes:
        raise DataError(f"a client has 1 to {classes} classes, not {count:.3g}")
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
