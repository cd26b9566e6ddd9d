"""Who has which samples: the split of a data set among the clients.

    iid              every client draws alike
    noniid:TAU       client c has a dominant class, c mod classes, with the share 1/(1+τ), and the others evenly
    noniid-text:TAU  the same with the share 1−τ, as the paper's text has it; its tables have the other
    dirichlet:A      each class is dealt out by a draw from Dirichlet(A)
    classes:C        each client has C classes, evenly

Train and test are split alike. Nobody shares a training sample with anybody.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nmoe_train.errors import DataError

Indices = NDArray[np.int64]


def class_counts(partition: str, clients: int, classes: int, size: int, seed: int) -> NDArray[np.int64]:
    """How many samples of each class each client is due: (clients, classes), every row summing to `size`."""
    kind, _, text = partition.partition(":")
    if kind not in _SHARES or bool(text) == (kind == "iid"):
        raise DataError(f"no split is called {partition!r}; there are {', '.join(EXAMPLES)}")
    try:
        value = float(text or 0)
    except ValueError:
        raise DataError(f"{text!r} in {partition!r} is no number") from None
    shares = _SHARES[kind](value, clients, classes, np.random.default_rng([seed, 1]))
    return np.stack([_apportion(row, size, start=client) for client, row in enumerate(shares)])


def split(y: NDArray[np.int64], counts: NDArray[np.int64], seed: int) -> list[Indices]:
    """Deal the samples out as `counts` says, nobody's twice; each client's indices in random order."""
    draw = np.random.default_rng([seed, 2])
    decks = [draw.permutation(np.flatnonzero(y == label)) for label in range(counts.shape[1])]
    for label, (deck, due) in enumerate(zip(decks, counts.sum(0), strict=True)):
        if due > len(deck):
            raise DataError(f"the split needs {due} samples of class {label}, but there are {len(deck)}: take fewer")
    ends = counts.cumsum(0)
    parts = [
        np.concatenate([deck[end - n : end] for deck, end, n in zip(decks, ends[c], counts[c], strict=True)])
        for c in range(len(counts))
    ]
    return [draw.permutation(part) for part in parts]


def largest_size(y: NDArray[np.int64], partition: str, clients: int, classes: int, seed: int) -> int:
    """The most samples a client can have in this split."""
    available = np.bincount(y, minlength=classes)
    low, high = 0, len(y) // clients
    while low < high:
        size = (low + high + 1) // 2
        fits = (class_counts(partition, clients, classes, size, seed).sum(0) <= available).all()
        low, high = (size, high) if fits else (low, size - 1)
    if low == 0:
        raise DataError(f"{partition} among {clients} clients leaves somebody without a sample")
    return low


def _apportion(shares: NDArray[np.float64], size: int, start: int) -> NDArray[np.int64]:
    """Whole numbers nearest to `shares` of `size`; what rounding leaves goes round from class `start` on."""
    exact = shares * size
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.roll(np.arange(len(shares)), -start - 1)  # so that the clients' remainders fall on different classes
    order = order[np.argsort(-np.round(exact - counts, 9)[order], kind="stable")]
    counts[order[: size - counts.sum()]] += 1
    return counts


def _iid(_value: float, clients: int, classes: int, _draw: np.random.Generator) -> NDArray[np.float64]:
    return np.full((clients, classes), 1 / classes)


def _dominated(share: float, clients: int, classes: int) -> NDArray[np.float64]:
    if not 0 < share <= 1:
        raise DataError(f"a dominant share of {share:.3g} is not in 0..1")
    shares = np.full((clients, classes), (1 - share) / (classes - 1))
    shares[np.arange(clients), np.arange(clients) % classes] = share
    return shares


def _noniid(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> NDArray[np.float64]:
    if tau < 0:
        raise DataError(f"τ is {tau:.3g}, less than 0")
    return _dominated(1 / (1 + tau), clients, classes)


def _noniid_text(tau: float, clients: int, classes: int, _draw: np.random.Generator) -> NDArray[np.float64]:
    return _dominated(1 - tau, clients, classes)


def _dirichlet(alpha: float, clients: int, classes: int, draw: np.random.Generator) -> NDArray[np.float64]:
    if alpha <= 0:
        raise DataError(f"a Dirichlet split needs a number over 0, not {alpha:.3g}")
    shares = draw.dirichlet([alpha] * clients, size=classes).T  # (clients, classes): each class dealt out
    return shares / shares.sum(1, keepdims=True)


def _classes(count: float, clients: int, classes: int, _draw: np.random.Generator) -> NDArray[np.float64]:
    if count != int(count) or not 1 <= count <= classes:
        raise DataError(f"a client has 1 to {classes} classes, not {count:.3g}")
    shares = np.zeros((clients, classes))
    for client in range(clients):
        shares[client, (client + np.arange(int(count))) % classes] = 1 / count
    return shares


_SHARES: dict[str, Callable[[float, int, int, np.random.Generator], NDArray[np.float64]]] = {
    "iid": _iid,
    "noniid": _noniid,
    "noniid-text": _noniid_text,
    "dirichlet": _dirichlet,
    "classes": _classes,
}
EXAMPLES = ("iid", "noniid:0.5", "noniid-text:0.5", "dirichlet:0.3", "classes:2")
