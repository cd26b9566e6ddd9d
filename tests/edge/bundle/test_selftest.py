"""Reading selftest.npz, and comparing the answers of two machines."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.bundle.selftest import SelfTest, compare_answers, parse_selftest

SCORES = np.eye(3, dtype=np.float32)
"""The gate of the tiny fleet chooses one expert per sample: 0, 1, 2."""


@pytest.fixture
def bundle(tiny_fleet):
    return read_bundle(tiny_fleet / "barn")


@pytest.fixture
def compared(bundle):
    """Compare answers with the exporter's; those not given are equal to them."""
    test = bundle.selftest

    def compare(latents=test.latents, scores=SCORES, outputs=test.outputs):
        return compare_answers(test, bundle.manifest, latents, scores, outputs)

    return compare


def test_a_selftest_is_read_back_unchanged(bundle):
    test = parse_selftest(bundle.selftest.write(), bundle.manifest)
    for field in fields(SelfTest):
        assert np.array_equal(getattr(test, field.name), getattr(bundle.selftest, field.name))


def test_equal_answers_pass(compared):
    result = compared()
    assert result.passed
    assert (result.rows, result.latent_difference, result.output_difference, result.other_choices) == (3, 0, 0, 0)


def test_differences_up_to_the_tolerance_pass_and_larger_ones_fail(bundle, compared):
    test = bundle.selftest
    half = np.float32(test.output_tolerance / 2)
    assert compared(outputs=test.outputs + half).passed
    result = compared(outputs=test.outputs + 4 * half)
    assert not result.passed
    assert result.output_difference == pytest.approx(4 * half, rel=0.1)
    assert result.latent_difference == 0


@pytest.mark.parametrize("name", ["latents", "outputs"])
def test_nan_fails(bundle, compared, name):
    answers = getattr(bundle.selftest, name).copy()
    answers[0, 0] = np.nan
    assert not compared(**{name: answers}).passed


def test_another_choice_of_the_gate_fails(compared):
    result = compared(scores=SCORES[[1, 0, 2]])
    assert not result.passed
    assert result.other_choices == 2
