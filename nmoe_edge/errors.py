"""Every exception that nmoe_edge raises on purpose.

    EdgeError
    ├── ProtocolError
    │   ├── LocalProtocolError    this side built a message that the wire cannot carry
    │   └── RemoteProtocolError   the other side sent bytes that are not a valid message
    ├── BundleError               a bundle cannot be read, verified or written
    ├── FleetError                a fleet.toml is invalid, or does not match its bundles
    ├── ModelError                a graph does not run here or fails its self-test, or a setting does not fit it
    ├── InputError                a file is not an input for this model
    ├── KeyFileError              a key file is missing, invalid or readable by others
    ├── NetworkError              a socket cannot be opened, or is refused without keys
    ├── BenchError                a benchmark cannot be run, or a record cannot be used
    └── CallError                 a client cannot ask, gets no answer, or is refused

A peer that does not answer is normal in a fleet and raises nothing: it is part of the answer as data.
"""

from __future__ import annotations


class EdgeError(Exception):
    """The root of the tree. Its text is one line that says what is wrong and what to do."""


class ProtocolError(EdgeError):
    """Raised as one of its two subclasses when a message is invalid."""


class LocalProtocolError(ProtocolError):
    """Raised when this side builds a message that the wire cannot carry: a bug, or data out of range."""


class RemoteProtocolError(ProtocolError):
    """Raised when received frames are not a valid message: a bug of the other side, or an attack."""

    def __init__(self, text: str, request: int | None = None) -> None:
        """request: the number of the request that could not be decoded; None if the number could not be read either."""
        super().__init__(text)
        self.request = request


class BundleError(EdgeError):
    """Raised when a bundle is missing, does not match its manifest, or must not replace an existing folder."""


class FleetError(EdgeError):
    """Raised when fleet.toml cannot be read or written, is invalid, lacks a device, or does not match its bundles."""


class ModelError(EdgeError):
    """Raised when onnxruntime cannot run a graph, its answers differ from the exporter's, or a setting does not fit."""


class InputError(EdgeError):
    """Raised when a file cannot be read as rows of the model's input shape and dtype."""


class KeyFileError(EdgeError):
    """Raised when a key file is missing, invalid, readable by others, or cannot be written."""


class NetworkError(EdgeError):
    """Raised when a socket cannot be opened at an address, or when the address needs CURVE keys."""


class BenchError(EdgeError):
    """Raised when a benchmark cannot be run, or a record cannot be read, written or compared."""


class CallError(EdgeError):
    """Raised when a client cannot ask its device, gets no answer in time, or is refused."""
