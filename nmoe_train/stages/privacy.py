"""What releases protected by Gaussian noise cost, exactly: Gaussian differential privacy.

One release of sensitivity Δ under noise σ is μ-GDP with μ = Δ/σ; T of them compose to √T · μ, and

    δ(ε) = Φ(-ε/μ + μ/2) - exp(ε) · Φ(-ε/μ - μ/2)

Nothing is bounded on the way, so no better accountant exists for this mechanism. Knows no training: only releases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

HIGHEST = 1e6
"""An ε from here on protects nobody, and is called infinite."""


def delta_of(epsilon: float, mu: float) -> float:
    """The δ at which μ-GDP is (ε, δ)-differentially private."""
    return _phi(-epsilon / mu + mu / 2) - math.exp(epsilon + _log_phi(-epsilon / mu - mu / 2))


@lru_cache
def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε for which μ-GDP is (ε, δ)-differentially private."""
    if mu == 0 or delta_of(0, mu) <= delta:
        return 0.0
    if mu * mu / 2 > HIGHEST:
        return math.inf
    return _root(lambda epsilon: delta - delta_of(epsilon, mu), 0, mu * mu / 2 + mu * 40 + 1)


def spent(sensitivity: float, sigma: float, releases: int, delta: float) -> float:
    """ε of so many releases; infinite without noise."""
    if releases == 0:
        return 0.0
    return epsilon_of(math.sqrt(releases) * sensitivity / sigma, delta) if sigma else math.inf


@lru_cache
def noise_for(epsilon: float, sensitivity: float, releases: int, delta: float) -> float:
    """The smallest σ at which so many releases cost at most ε."""
    mu = _root(lambda mu: epsilon_of(mu, delta) - epsilon, 0, math.sqrt(2 * epsilon) + 2 * math.sqrt(epsilon) + 40)
    return math.sqrt(releases) * sensitivity / mu


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function passes zero, from below."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    """log Φ(x), also where Φ(x) is too small for a float."""
    if x > -30:
        return math.log(_phi(x))
    return -x * x / 2 - math.log(-x) - 0.5 * math.log(2 * math.pi) - 1 / (x * x)
