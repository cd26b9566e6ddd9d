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
    fingerprint: str
    """SHA-256 of the data set and of every client's training and held-out samples"""

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
    own_test = test_samples(dataset, config, config.test_partition or config.partition, seed)
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
    return Clients(train, held_out, own_test, test, _fingerprint(dataset, [*train, *held_out]))


def test_samples(dataset: Dataset, config: DataConfig, partition: str, seed: int) -> list[Part]:
    """Each client's own test samples under a partition. With "iid", those of the paper's table II."""
    _, maximum = PAPER_SIZES.get(config.name, (None, None))
    y = dataset.y_test
    classes = len(dataset.labels)
    counts = counts_for_size(y, partition, config.clients, classes, config.test_size, maximum, seed, "test")
    return _samples(dataset.x_test, y, draw_samples(y, counts, seed + 1))


def _samples(x: NDArray[np.uint8], y: NDArray[np.int64], clients: Sequence[Indices]) -> list[Part]:
    return [(torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in clients]


def _fingerprint(dataset: Dataset, parts: list[Part]) -> str:
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for x, y in parts:
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()
