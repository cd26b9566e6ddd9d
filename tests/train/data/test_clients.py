"""Who has what, and that nobody has what is another's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nmoe_train.data.clients import deal
from nmoe_train.config import DataConfig
from nmoe_train.data.datasets import load


def test_nobody_trains_on_what_is_held_out_or_tested_on():
    """By the digits' own number: an image that stands twice in the data is another one each time."""
    dataset = load("digits")
    stamped = replace(
        dataset,
        x_train=numbered(dataset.x_train, 0),
        x_test=numbered(dataset.x_test, len(dataset.x_train)),
    )
    clients = deal(stamped, DataConfig(), 0)

    def numbers(parts):
        return [int(n) for x, _ in parts for n in stamp(x)]

    train, held_out, own = numbers(clients.train), numbers(clients.held_out), numbers(clients.own_test)
    test = numbers([clients.test])
    for part in (train, held_out, own, test):
        assert len(part) == len(set(part))
    assert not set(train) & set(held_out)
    assert not (set(train) | set(held_out)) & set(test)
    assert set(own) <= set(test)
    assert len(train) + len(held_out) == 1200


def numbered(x, first):
    """Images whose first two pixels say which they are."""
    x = x.copy()
    n = np.arange(first, first + len(x))
    x[:, 0, 0, 0], x[:, 0, 0, 1] = n // 256, n % 256
    return x


def stamp(x):
    return x[:, 0, 0, 0].long() * 256 + x[:, 0, 0, 1].long()


def test_own_tests_are_split_like_the_training_or_as_it_is_said():
    dataset = load("digits")
    alike = deal(dataset, DataConfig(), 0)
    assert alike.split(10)["test"][3][3] > 40
    even = deal(dataset, DataConfig(test_partition="iid"), 0)
    assert max(even.split(10)["test"][3]) - min(even.split(10)["test"][3]) <= 1
    assert even.split(10)["train"] == alike.split(10)["train"]
