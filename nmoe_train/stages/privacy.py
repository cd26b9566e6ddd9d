"""The privacy budget ε that a client spends by publishing matrices with Gaussian noise, computed exactly.

One release with sensitivity Δ and noise σ is μ-GDP (Gaussian differential privacy) with μ = Δ/σ. T releases compose to
√T · μ, and μ-GDP is (ε, δ)-differentially private for every pair on the curve

    δ(ε) = Φ(-ε/μ + μ/2) - exp(ε) · Φ(-ε/μ - μ/2)

No step uses a bound, so no accountant gives a smaller ε for this mechanism. This module computes numbers only;
extractor.py draws the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

_MAX_EPSILON = 1e6
"""A larger ε is reported as infinite: it protects nothing."""


def delta_of(epsilon: float, mu: float) -> float:
    """The δ for which μ-GDP is (ε, δ)-differentially private."""
    return _phi(-epsilon / mu + mu / 2) - math.exp(epsilon + _log_phi(-epsilon / mu - mu / 2))


@lru_cache
def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε for which μ-GDP is (ε, δ)-differentially private."""
    if mu == 0 or delta_of(0, mu) <= delta:
        return 0.0
    if mu * mu / 2 > _MAX_EPSILON:
        return math.inf
    return _root(lambda epsilon: delta - delta_of(epsilon, mu), 0, mu * mu / 2 + mu * 40 + 1)


def epsilon_spent(sensitivity: float, sigma: float, releases: int, delta: float) -> float:
    """The ε of this many releases: 0 for none, infinite without noise.

    sensitivity: how far (in Frobenius norm) replacing one sample can move one release
    sigma: standard deviation of the noise
    """
    if releases == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    return epsilon_of(math.sqrt(releases) * sensitivity / sigma, delta)


@lru_cache
def noise_for(epsilon: float, sensitivity: float, releases: int, delta: float) -> float:
    """The smallest σ for which this many releases spend at most ε."""
    mu = _root(lambda mu: epsilon_of(mu, delta) - epsilon, 0, math.sqrt(2 * epsilon) + 2 * math.sqrt(epsilon) + 40)
    return math.sqrt(releases) * sensitivity / mu


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a rising function between `low` and `high`, by bisection, rounded up."""
    for _ in range(100):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return high


def _phi(x: float) -> float:
    """The standard normal distribution function Φ."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    """log Φ(x), accurate even where Φ(x) underflows to zero."""
    if x > -30:
        return math.log(_phi(x))
    return -x * x / 2 - math.log(-x) - 0.5 * math.log(2 * math.pi) - 1 / (x * x)
