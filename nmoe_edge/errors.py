"""Everything that nmoe_edge raises on purpose.

    EdgeError
    ├── ProtocolError
    │   ├── LocalProtocolError    we tried to say what the wire cannot carry: our bug, our data
    │   └── RemoteProtocolError   what arrived is no message: their bug, or their attack
    ├── BundleError               a bundle that is not what its manifest says, or not ours to write over
    ├── FleetError                a fleet.toml that cannot be so
    ├── ModelError                a graph that does not run here, or does not answer as it did at the desk
    ├── InputError                a file that is no input of this model
    ├── KeyFileError              a key file that is missing, no key, or open to others
    ├── NetworkError              an address that cannot be had, or must not be without keys
    ├── BenchError                a measurement that could not be made, or a file that is the record of none
    └── CallError                 the device that an application asked does not answer, or refuses

A silent peer is weather, not failure: it comes back as data and is never raised.
"""

from __future__ import annotations


class EdgeError(Exception):
    """The root: its text is one line that says what to do."""


class ProtocolError(EdgeError):
    """Something is wrong with a message."""


class LocalProtocolError(ProtocolError):
    """We made a message that the wire cannot carry."""


class RemoteProtocolError(ProtocolError):
    """What arrived is not a message."""

    def __init__(self, text: str, request: int | None = None) -> None:
        """`request` is the number of the request that was not understood, where so much could be read."""
        super().__init__(text)
        self.request = request


class BundleError(EdgeError):
    """A bundle cannot be trusted, or cannot be written."""


class FleetError(EdgeError):
    """A fleet file cannot be read, or says what cannot be."""


class ModelError(EdgeError):
    """A graph cannot be run, or gives other answers than at the desk."""


class InputError(EdgeError):
    """A file is no input of this model."""


class KeyFileError(EdgeError):
    """A key file cannot be used, or cannot be written."""


class NetworkError(EdgeError):
    """A socket that cannot be had."""


class BenchError(EdgeError):
    """Something could not be measured, or is no record of a measurement."""


class CallError(EdgeError):
    """The device that was asked gave no answer."""
