"""A short training for tests, and what to compare of two of them."""

from __future__ import annotations

import hashlib

SHORT = {
    "extractor": {"rounds": 2},
    "gate": {"method": "fedgate", "rounds": 3, "laps": 1},
    "experts": {"epochs": 2},
    "data": {"clients": 3},
}


class Stop(Exception):
    pass


def stop_after(rounds):
    """A progress function that stops the training after so many rounds, as Ctrl-C would."""
    left = iter(range(rounds - 1))

    def stop(_finished):
        if next(left, None) is None:
            raise Stop

    return stop


def weights(folder):
    """Digest of every file of a run that holds weights or arrays."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".safetensors", ".npz"}
    }


def repeatable(metrics):
    """The metrics without what a second training of the same settings may change: times, memory and energy."""
    resources = {**metrics["resources"], "measured": None, "client_seconds": None}
    return {**metrics, "seconds": None, "resources": resources}
