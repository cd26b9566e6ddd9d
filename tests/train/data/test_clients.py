"""Clients get disjoint samples with the requested class mix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from train.refusals import refused

from nmoe_train.config import DataConfig
from nmoe_train.data.clients import assign_samples
from nmoe_train.data.datasets import load


def test_training_held_out_and_test_samples_are_disjoint():
    """Every image carries its number, because the data contain equal images."""
    dataset = load("digits")
    with_numbers = replace(
        dataset,
        x_train=numbered(dataset.x_train, 0),
        x_test=numbered(dataset.x_test, len(dataset.x_train)),
    )
    clients = assign_samples(with_numbers, DataConfig(), 0)

    def numbers(parts):
        return [int(n) for x, _ in parts for n in number_of(x)]

    train = numbers(clients.train)
    held_out = numbers(clients.held_out)
    own = numbers(clients.own_test)
    test = numbers([clients.test])
    for part in (train, held_out, own, test):
        assert len(part) == len(set(part))
    assert not set(train) & set(held_out)
    assert not (set(train) | set(held_out)) & set(test)
    assert set(own) <= set(test)
    assert len(train) + len(held_out) == 1200


def test_every_client_has_balanced_test_samples_of_its_own_besides_its_own_distribution():
    clients = assign_samples(load("digits"), DataConfig(), 0)
    sizes = {len(y) for _, y in clients.iid_test}
    assert sizes == {min(len(clients.own_test[0][1]), 597 // 10)}
    for _, y in clients.iid_test:
        counts = np.bincount(y, minlength=10)
        assert counts.max() - counts.min() <= 1
    assert list(clients.tests()) == ["own", "iid", "iid_rows"]


def test_a_test_set_that_lacks_a_class_has_no_balanced_samples_but_can_be_used():
    digits = load("digits")
    known = digits.y_test < 9
    lacking = replace(digits, x_test=digits.x_test[known], y_test=digits.y_test[known])
    clients = assign_samples(lacking, DataConfig(clients=4, partition="classes:2"), 0)
    assert list(clients.tests()) == ["own", "iid"]


def test_an_error_of_the_split_says_which_samples_are_too_few():
    digits = load("digits")
    with refused("needs 500 test samples of class 8, but there are 54; lower data.test_size or data.clients"):
        assign_samples(digits, DataConfig(partition="iid", test_size=500), 0)
    with refused("needs 500 training samples of class 0, but there are 120; lower data.train_size or data.clients"):
        assign_samples(digits, DataConfig(partition="iid", train_size=500), 0)
    small = replace(digits, x_test=digits.x_test[:15], y_test=digits.y_test[:15])
    with refused("iid among 10 clients leaves 0 of 15 test samples per client"):
        assign_samples(small, DataConfig(partition="iid"), 0)


def numbered(x, first):
    """Images with their number in the first two pixels."""
    x = x.copy()
    n = np.arange(first, first + len(x))
    x[:, 0, 0, 0], x[:, 0, 0, 1] = n // 256, n % 256
    return x


def number_of(x):
    return x[:, 0, 0, 0].long() * 256 + x[:, 0, 0, 1].long()


def test_own_test_sets_are_split_like_the_training_samples_or_by_test_partition():
    dataset = load("digits")
    alike = assign_samples(dataset, DataConfig(), 0)
    assert alike.class_counts(10)["test"][3][3] > 40
    even = assign_samples(dataset, DataConfig(test_partition="iid"), 0)
    assert max(even.class_counts(10)["test"][3]) - min(even.class_counts(10)["test"][3]) <= 1
    assert even.class_counts(10)["train"] == alike.class_counts(10)["train"]
