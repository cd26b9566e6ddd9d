"""A data set distributed among clients: each client's training, held-out and test samples.

partition.py decides which samples a client gets; this module cuts the held-out part off and computes the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmoe_train.config import DataConfig
from nmoe_train.data.datasets import Dataset
from nmoe_train.data.partition import Indices, counts_for_size, draw_samples
from nmoe_train.errors import DataError

PAPER_SIZES = {"cifar10": (2500, 1000)}
"""Upper limits of training and test samples per client if data.train_size and data.test_size are not set."""

IID_ROWS = "iid_rows"
"""The name of `Clients.iid_test` in metrics.json and baselines.json."""

Part = tuple[Tensor, Tensor]
"""Images or latents (n, …) and labels (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Clients:
    """Every client's samples.

    Training and held-out samples are disjoint: no sample appears twice, and none of them is in a test set.
    """

    train: list[Part]
    held_out: list[Part]
    own_test: list[Part]
    """Each client's test samples, distributed like its training samples or as data.test_partition says"""
    test: Part
    """The whole test set of the data set"""
    iid_test: list[Part]
    """Each client's balanced test samples, as many as in own_test if there are enough: the paper's table II.
    Empty if the test set lacks a class"""
    fingerprint: str
    """SHA-256 of the data set and of every client's training and held-out samples"""

    def tests(self) -> dict[str, list[Part]]:
        """The test sets by their names in metrics.json: one part per client, or a single part for all clients."""
        parts = {"own": self.own_test, "iid": [self.test], IID_ROWS: self.iid_test}
        return {name: part for name, part in parts.items() if part}

    def class_counts(self, classes: int) -> dict[str, list[list[int]]]:
        """Sample counts as lists [client][class], for "train", "held_out" and "test"."""
        parts = {"train": self.train, "held_out": self.held_out, "test": self.own_test}
        return {name: [_class_counts(y, classes) for _, y in clients] for name, clients in parts.items()}


def _class_counts(y: Tensor, classes: int) -> list[int]:
    counts: list[int] = torch.bincount(y, minlength=classes).tolist()
    return counts


def assign_samples(dataset: Dataset, config: DataConfig, seed: int) -> Clients:
    """Distribute a data set among the clients.

    DataError: there are too few samples for this partition, or for held-out samples.
    """
    classes = len(dataset.labels)
    maximum, _ = PAPER_SIZES.get(config.name, (None, None))
    y = dataset.y_train
    counts = counts_for_size(y, config.partition, config.clients, classes, config.train_size, maximum, seed)
    available = _samples(dataset.x_train, y, draw_samples(y, counts, seed))
    own_test = _test_samples(dataset, config, config.test_partition or config.partition, seed)
    iid_test = _iid_samples(dataset, config.clients, len(own_test[0][1]), seed)
    train, held_out = [], []
    for x, y in available:
        n = max(1, round(len(y) * config.held_out))
        if n >= len(y):
            raise DataError(
                f"a client has {len(y)} training samples and must hold out {n} of them, which leaves none to train on; "
                "lower data.clients or data.held_out"
            )
        held_out.append((x[:n], y[:n]))
        train.append((x[n:], y[n:]))
    test = (torch.from_numpy(dataset.x_test), torch.from_numpy(dataset.y_test))
    return Clients(train, held_out, own_test, test, iid_test, _fingerprint(dataset, [*train, *held_out]))


def _test_samples(dataset: Dataset, config: DataConfig, partition: str, seed: int) -> list[Part]:
    """Each client's own test samples under a partition."""
    _, maximum = PAPER_SIZES.get(config.name, (None, None))
    y = dataset.y_test
    classes = len(dataset.labels)
    counts = counts_for_size(y, partition, config.clients, classes, config.test_size, maximum, seed, "test")
    return _samples(dataset.x_test, y, draw_samples(y, counts, seed + 1))


def _iid_samples(dataset: Dataset, clients: int, most: int, seed: int) -> list[Part]:
    """The same number of balanced test samples for each client, at most `most`; none where that is impossible."""
    y = dataset.y_test
    classes = len(dataset.labels)
    if not np.bincount(y, minlength=classes).all():
        return []
    try:
        counts = counts_for_size(y, "iid", clients, classes, None, most, seed, "test")
    except DataError:
        return []
    return _samples(dataset.x_test, y, draw_samples(y, counts, seed + 1))


def _samples(x: NDArray[np.uint8], y: NDArray[np.int64], clients: Sequence[Indices]) -> list[Part]:
    return [(torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in clients]


def _fingerprint(dataset: Dataset, parts: list[Part]) -> str:
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for x, y in parts:
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()
