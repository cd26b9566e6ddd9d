"""Numbers and names as text. Every function here is a Jinja filter of the same name; None becomes a dash."""

from __future__ import annotations

import math

MISSING = "–"
METHOD_NAMES = {
    "networked": "Networked",
    "own_expert": "Own expert alone",
    "fedce": "FedCE classifier",
    "local": "Local classifier",
    "fedavg": "FedAvg classifier",
    "fedavg_prior": "FedAvg + class mix",
    "fedavg_tuned": "FedAvg + fine-tuning",
    "fedrep": "FedRep",
    "ditto": "Ditto",
    "lda": "Federated LDA",
    "lda_prior": "LDA + class mix",
    "centralised": "Centralised mixture",
}
"""Method of metrics.json or baselines.json -> its name in tables and on pages."""
BASELINES = tuple(METHOD_NAMES)[3:]
"""Methods of baselines.json."""


def count(number: float | None) -> str:
    """1234567 -> 1,234,567"""
    return MISSING if number is None else f"{number:,}"


def times(number: int) -> str:
    """1 -> once, 1200 -> 1,200 times"""
    return "once" if number == 1 else f"{number:,} times"


def percent(share: float | None) -> str:
    """0.1234 -> 12.3 %"""
    return MISSING if share is None else f"{percentage(share)} %"


def percentage(share: float | None) -> str:
    """0.1234 -> 12.3, for a table that names the unit elsewhere"""
    return MISSING if share is None else f"{100 * share:.1f}"


def decimals(number: float | None, digits: int) -> str:
    """(2.345, 2) -> 2.35"""
    return MISSING if number is None else f"{number:.{digits}f}"


def ratio(number: float | None) -> str:
    """2.5 -> 2.50 ×"""
    return MISSING if number is None else f"{number:.2f} ×"


def size(number: float | None) -> str:
    """Bytes: 35200000 -> 35.2 MB"""
    if number is None:
        return MISSING
    power = min(int(math.log10(max(number, 1)) / 3), 4)
    digits = 0 if power == 0 else 1
    return f"{number / 1000**power:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def operations(number: float | None) -> str:
    """1234567 -> 1.2 M"""
    if number is None:
        return MISSING
    power = min(int(math.log10(max(number, 1)) / 3), 5)
    return f"{number:.0f}" if power == 0 else f"{number / 1000**power:.1f} {('k', 'M', 'G', 'T', 'P')[power - 1]}"


def energy(joules: float | None) -> str:
    """12.34 -> 12.3 J"""
    return MISSING if joules is None else f"{joules:,.1f} J"


def seconds(number: float | None, digits: int = 2) -> str:
    """0.25 -> 0.25 s"""
    return MISSING if number is None else f"{number:.{digits}f} s"


def duration(number: float | None) -> str:
    """Seconds: 6.42 -> 6.4 s, 72 -> 1 min 12 s, 3712 -> 1 h 1 min"""
    if number is None:
        return MISSING
    minutes, rest = divmod(round(number), 60)
    if minutes == 0:
        return f"{number:.1f} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def milliseconds(number: float | None) -> str:
    """3.456 -> 3.46 ms, 34.56 -> 35 ms"""
    if number is None:
        return MISSING
    digits = 2 if number < 10 else 0
    return f"{number:.{digits}f} ms"


def microseconds(number_ms: float | None) -> str:
    """Milliseconds: 0.0115 -> 11.5 µs"""
    return MISSING if number_ms is None else f"{1000 * number_ms:.1f} µs"
