"""A data set dealt out: who trains, holds out and is tested on what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nmoe_train.config import DataConfig
from nmoe_train.data.datasets import Dataset
from nmoe_train.errors import DataError
from nmoe_train.data.partition import sized, split

PAPER_SIZES = {"cifar10": (2500, 1000)}
"""The most training and test samples a client gets when nobody says how many."""

Part = tuple[Tensor, Tensor]
"""Images or latents (n, …), and labels (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Clients:
    """Who has what. No training or held-out sample is another's too, and none of them is in a test set."""

    train: list[Part]
    held_out: list[Part]
    own_test: list[Part]
    """For each client, distributed like its training samples, or as data.test_partition says."""
    test: Part
    """Everybody's: the whole test set."""
    fingerprint: str
    """sha256 of the samples and of who has which."""

    def split(self, classes: int) -> dict[str, list[list[int]]]:
        """How many samples of each class each client has: to train, held out, to be tested on."""
        named = {"train": self.train, "held_out": self.held_out, "test": self.own_test}
        return {
            name: [torch.bincount(y, minlength=classes).tolist() for _, y in parts] for name, parts in named.items()
        }


def deal(dataset: Dataset, config: DataConfig, seed: int) -> Clients:
    """Split a data set among the clients."""
    classes, usual = len(dataset.labels), PAPER_SIZES.get(config.name, (None, None))

    def parts(
        x: np.ndarray, y: np.ndarray, partition: str, wanted: int | None, most: int | None, shuffle: int
    ) -> list[Part]:
        counts = sized(y, partition, config.clients, classes, wanted, most, seed)
        return [(torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in split(y, counts, shuffle)]

    x, y = dataset.x_train, dataset.y_train
    train = parts(x, y, config.partition, config.train_size, usual[0], seed)
    x, y = dataset.x_test, dataset.y_test
    own_test = parts(x, y, config.test_partition or config.partition, config.test_size, usual[1], seed + 1)
    cut = [max(1, round(len(y) * config.held_out)) for _, y in train]
    if min(len(y) - n for (_, y), n in zip(train, cut, strict=True)) < 1:
        raise DataError(
            "a client has too few samples to hold one out and train on another: lower data.clients or data.held_out"
        )
    dealt = [(x[n:], y[n:]) for (x, y), n in zip(train, cut, strict=True)]
    held_out = [(x[:n], y[:n]) for (x, y), n in zip(train, cut, strict=True)]
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for x, y in dealt + held_out:
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    test = (torch.from_numpy(dataset.x_test), torch.from_numpy(dataset.y_test))
    return Clients(dealt, held_out, own_test, test, digest.hexdigest())
