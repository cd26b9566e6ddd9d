from __future__ import annotations

from dataclasses import fields, replace

import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.device.rules import GATE_ALONE, ResolvedRules, Rules
from nmoe_edge.errors import ModelError


@pytest.fixture
def manifest(tiny_fleet):
    return read_bundle(tiny_fleet / "attic").manifest


def test_what_a_user_leaves_open_is_as_the_bundle_says(manifest):
    routing = replace(manifest.routing, top_k=2, local_first=0.8, adapt=True)
    changed = replace(manifest, routing=routing, answers_carry_prior=False)
    rules = Rules().resolve(changed)
    assert (rules.top_k, rules.local_first, rules.adapt) == (2, 0.8, True)
    assert rules.latents == changed.latent.dtype
    assert (rules.deadline_s, rules.prefer_near, rules.hedge) == (1.0, 0.0, True)


def test_what_a_user_sets_holds(manifest):
    rules = Rules(top_k=3, local_first=0.0, adapt=False, latents="int8", deadline_s=2.0, prefer_near=0.5, hedge=False)
    assert rules.resolve(manifest) == ResolvedRules(3, 0.0, None, False, "int8", 2.0, 0.5, False)


@pytest.mark.parametrize("local_first", [None, 1.0])
def test_the_gate_alone_decides_has_one_representation(manifest, local_first):
    assert manifest.routing.local_first is None
    assert Rules(local_first=local_first).resolve(manifest).local_first == GATE_ALONE


def test_nothing_is_left_open_once_rules_are_resolved(manifest):
    names = [field.name for field in fields(ResolvedRules)]
    assert [name for name in names if name != "familiar"] == [field.name for field in fields(Rules)]
    resolved = Rules().resolve(manifest)
    assert [name for name in names if getattr(resolved, name) is None] == ["familiar"]  # None: not tested


def test_the_bundle_alone_says_which_latents_are_familiar(manifest):
    routing = replace(manifest.routing, familiar=2.5)
    assert Rules().resolve(replace(manifest, routing=routing)).familiar == 2.5


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_top_k_that_the_bundle_does_not_allow_is_refused(manifest, top_k):
    with pytest.raises(ModelError, match=rf"top-k {top_k} is not in 1\.\.3"):
        Rules(top_k=top_k).resolve(manifest)


def test_adapting_answers_that_carry_a_prior_is_refused(manifest):
    with pytest.raises(ModelError, match="carry no prior, and these do"):
        Rules(adapt=True).resolve(replace(manifest, answers_carry_prior=True))


@pytest.mark.parametrize("local_first", [float("nan"), -0.1, 1.1])
def test_a_confidence_is_a_number_from_zero_to_one(local_first):
    with pytest.raises(ModelError, match="local-first is .*; it must be a number from 0 to 1"):
        Rules(local_first=local_first)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, 3600.1, float("nan")])
def test_a_deadline_is_over_zero_and_at_most_an_hour(deadline_s):
    with pytest.raises(ModelError, match="is out of range: it must be over 0 and at most an hour"):
        Rules(deadline_s=deadline_s)


@pytest.mark.parametrize("prefer_near", [-0.1, float("inf"), float("nan")])
def test_prefer_near_is_finite_and_not_negative(prefer_near):
    with pytest.raises(ModelError, match="prefer-near is .*; it must be a finite number, 0 or more"):
        Rules(prefer_near=prefer_near)
