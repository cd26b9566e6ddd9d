"""What a device counts and how long its work takes. Every name is listed here, and the status report shows them.

Counters and durations are identifiers. A name that is missing in its table raises KeyError.
"""

from __future__ import annotations

import math
from collections import Counter

from nmoe_edge.status import DurationReport

COUNTERS = {
    "rows": "rows of requests that this device routed",
    "rows_local": "rows sent to the device's own expert alone, by local-first or by the gate",
    "rows_degraded": "rows answered without an expert that the gate wanted, or by no expert at all",
    "rows_unanswered": "rows that no expert answered; their outputs are zeros",
    "requests_refused_busy": "requests refused because the queue is full or the deadline too near",
    "requests_refused_expired": "requests refused because their deadline passed before extraction was finished",
    "requests_refused_bad_request": "requests refused because their inputs do not fit the bundle",
    "requests_refused_failed": "requests refused because a model failed",
    "requests_refused_shutting_down": "requests that were unfinished when the device ended",
    "asks": "Asks sent to peers, hedges included",
    "hedges": "calls made because another expert was late, of a peer or of the device's own expert",
    "answers_late": "replies to an Ask that is finished or unknown",
    "answers_unexpected": "replies from another peer than the one that was asked; that peer becomes `wrong`",
    "answers_refused_busy": "refusals by a peer: its queue is full",
    "answers_refused_expired": "refusals by a peer: the budget was spent before it began",
    "answers_refused_wrong_trunk": "refusals by a peer: its bundle has another extractor",
    "answers_refused_bad_request": "refusals by a peer: it has another expert, or the rows do not fit",
    "answers_refused_shutting_down": "refusals by a peer: it is leaving",
    "answers_refused_failed": "refusals by a peer: its model failed, or its reply could not be read",
    "calls_silent": "calls of an expert without an answer in time",
    "calls_refused": "calls of an expert that were refused, or could not be sent",
    "calls_lost": "calls of a peer that was lost before it answered",
    "calls_wrong": "calls of an expert with an unusable answer: NaN, infinity or a wrong shape",
    "peers_silent": "times an alive peer became `silent`",
    "peers_lost": "times an alive peer became `lost`",
    "peers_wrong": "times an alive peer became `wrong`",
    "peers_foreign": "times an alive peer became `foreign`",
    "peers_left": "times an alive peer said goodbye",
    "rows_for_peers": "rows that this device's expert answered for peers",
    "runs_for_peers": "runs of the expert for peers; one run answers several Asks",
    "asks_refused_busy": "Asks and Pings refused because the queue is full",
    "asks_refused_expired": "Asks refused because their budget was spent before they were run",
    "asks_refused_wrong_trunk": "Asks refused because their latents come from another extractor",
    "asks_refused_bad_request": "Asks refused because they want another expert, or their rows do not fit",
    "asks_refused_failed": "Asks refused because the expert failed",
    "messages_malformed": "messages that could not be decoded",
    "keys_unknown": "connections, or messages on open connections, with a key that fleet.toml does not list",
    "handshakes_failed": "connections that failed the CURVE handshake",
    "replies_undelivered": "replies that could not be sent: the receiver was gone, or too many messages waited for it",
    "replies_unrequested": "Answers, Results, Reports and Refusals sent to this device without a question",
    "reloads": "reloads of bundle and fleet.toml that were accepted",
    "reloads_refused": "reloads that failed a check; the device kept the old bundle",
    "bugs": "unexpected exceptions, and requests still open after their deadline; please report them",
}
"""Counter -> what one count means."""

DURATIONS = {
    "extraction": "from a request's arrival until extractor and gate are done with it",
    "request_local": "from arrival to Result, of a request answered by the device's own expert alone",
    "request_remote": "from arrival to Result, of any other request",
}
"""Duration -> what it measures."""

_BUCKETS_PER_DOUBLING = 8
"""A quantile is within nine percent."""
_MIN_S = 1e-6


class Histogram:
    """Durations in buckets that widen with the duration, so memory is bounded."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one duration; less than a microsecond counts as a microsecond."""
        self.count += 1
        self._buckets[max(0, int(math.log2(max(seconds, _MIN_S) / _MIN_S) * _BUCKETS_PER_DOUBLING))] += 1

    def quantile(self, share: float) -> float | None:
        """The seconds that this share (0..1) of the durations did not exceed; None without any duration."""
        remaining = math.ceil(share * self.count)
        for bucket in sorted(self._buckets):
            remaining -= self._buckets[bucket]
            if remaining <= 0:
                return _MIN_S * float(2.0 ** ((bucket + 0.5) / _BUCKETS_PER_DOUBLING))
        return None


class Metrics:
    """The counters and durations of one device. Only the node's thread changes them."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        """Counter -> count. Increment it directly; KeyError for a name that COUNTERS does not list."""
        self._durations = {name: Histogram() for name in DURATIONS}

    def took(self, duration: str, seconds: float) -> None:
        """Count one duration; KeyError for a name that DURATIONS does not list."""
        self._durations[duration].add(seconds)

    def counts_report(self) -> dict[str, int]:
        """Every counter above zero, by name."""
        return {name: count for name, count in sorted(self.counts.items()) if count}

    def durations_report(self) -> dict[str, DurationReport]:
        """Every duration that occurred, by name."""
        durations = sorted(self._durations.items())
        return {name: _duration_report(histogram) for name, histogram in durations if histogram.count}


def _duration_report(histogram: Histogram) -> DurationReport:
    return {
        "count": histogram.count,
        "p50_ms": milliseconds(histogram.quantile(0.50)),
        "p90_ms": milliseconds(histogram.quantile(0.90)),
        "p99_ms": milliseconds(histogram.quantile(0.99)),
    }


def milliseconds(seconds: float | None) -> float | None:
    """Seconds in milliseconds, as reports show them; None for no duration, and for infinity."""
    return None if seconds is None or seconds == math.inf else round(seconds * 1000, 3)
