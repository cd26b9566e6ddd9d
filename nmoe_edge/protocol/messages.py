"""The messages between devices, and between a client and the device it asks.

Each message is frozen and validates itself: making an invalid one raises LocalProtocolError. wire.py turns messages
into bytes; WIRE.md says which message answers which.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import IntEnum

from nmoe_edge.common.limits import MAX_ANSWERED, MAX_EXPERTS, check_device_name
from nmoe_edge.common.schema import parse_json
from nmoe_edge.common.text import printable
from nmoe_edge.errors import LocalProtocolError
from nmoe_edge.protocol.tensor import LATENT_DTYPES, Tensor

PROTOCOL = 1
"""The version of the wire format that this code writes and reads."""

TRUNK_BYTES = 16
MAX_DETAIL = 200
"""Characters in the detail of a Refuse."""

_CAPABILITY = re.compile(r"[a-z0-9][a-z0-9_.:/+-]{0,47}")
_DIGEST = re.compile(r"([0-9a-f]{64})?")


class Reason(IntEnum):
    """Why a device refuses a request. The numbers are part of the wire format."""

    BUSY = 1
    """The queue is full: try another expert."""
    EXPIRED = 2
    """The budget ran out before the work began."""
    WRONG_TRUNK = 3
    """The latents were made by another extractor."""
    BAD_REQUEST = 4
    """Not this device's expert, or rows of the wrong shape or dtype."""
    SHUTTING_DOWN = 5
    """The device finishes what it has begun and accepts nothing new."""
    FAILED = 6
    """The work began and failed."""


def _require(condition: bool, text: str, *values: object) -> None:
    if not condition:
        raise LocalProtocolError(text.format(*values))


def _check_name(name: str) -> None:
    try:
        check_device_name(name)
    except ValueError as error:
        raise LocalProtocolError(str(error)) from error


def _check_identity(message: Hello | Welcome) -> None:
    _check_name(message.device)
    _check_numbers(message, "expert")
    _check_trunk(message.trunk)
    valid = isinstance(message.bundle, str) and _DIGEST.fullmatch(message.bundle)
    _require(bool(valid), "{!r} is not a bundle digest", message.bundle)
    _require(isinstance(message.capabilities, tuple), "capabilities must be a list")
    _require(len(message.capabilities) <= 32, "more than 32 capabilities")
    for capability in message.capabilities:
        valid = isinstance(capability, str) and _CAPABILITY.fullmatch(capability)
        _require(bool(valid), "{!r} is not a capability", capability)


def _check_protocol(protocol: int) -> None:
    _require(type(protocol) is int and 0 < protocol < 256, "{!r} is not a protocol version", protocol)


_LIMITS = {
    "request": 2**64,
    "trace": 2**64,
    "budget_ms": 2**32,
    "compute_us": 2**32,
    "elapsed_us": 2**32,
    "expert": MAX_EXPERTS,
}


def _check_numbers(message: object, *names: str) -> None:
    for name in names:
        number = getattr(message, name)
        if not (isinstance(number, int) and 0 <= number < _LIMITS[name]):
            raise LocalProtocolError(f"{name} {number} is not in 0..{_LIMITS[name] - 1}")


def _check_rows(what: str, tensor: Tensor, dtypes: tuple[str, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise LocalProtocolError(f"{what} cannot be sent as {tensor.dtype}")
    if len(tensor.shape) != 2:
        raise LocalProtocolError(f"{what} must have shape (rows, {what}), not {tensor.shape}")


def _check_trunk(trunk: bytes) -> None:
    if not (isinstance(trunk, bytes) and len(trunk) == TRUNK_BYTES):
        raise LocalProtocolError(f"a trunk digest has {TRUNK_BYTES} bytes, not {trunk!r}")


@dataclass(frozen=True, slots=True)
class Hello:
    """Introduces this device to a peer: its name, its expert and the extractor of its latents."""

    device: str
    expert: int
    trunk: bytes
    capabilities: tuple[str, ...] = ()
    """What this device can do beyond the minimum of its version, such as `latent:int8`. Unknown ones are ignored."""
    protocols: tuple[int, ...] = (PROTOCOL,)
    """Every wire version that it can use; the peer picks one."""
    bundle: str = ""
    """Digest of the bundle that it serves, for display; may be empty."""

    def __post_init__(self) -> None:
        _check_identity(self)
        _require(isinstance(self.protocols, tuple), "protocol versions must be a list")
        _require(0 < len(self.protocols) <= 16, "expected 1 to 16 protocol versions")
        for protocol in self.protocols:
            _check_protocol(protocol)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Accepts a Hello, and introduces the other device in the same way."""

    device: str
    expert: int
    trunk: bytes
    capabilities: tuple[str, ...] = ()
    protocol: int = PROTOCOL
    """The wire version to use from now on."""
    bundle: str = ""
    """As in a Hello."""

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_protocol(self.protocol)


@dataclass(frozen=True, slots=True)
class Ask:
    """Run your expert on these latents."""

    request: int
    """The sender's number, never reused. Numbers start at random, so a restarted device matches no old answers."""
    trace: int
    """An id for joining the logs of several devices; passed on unread. 0 for none."""
    budget_ms: int
    """Milliseconds left until the origin's deadline. Work without budget left is never begun."""
    expert: int
    """The expert that is asked. A device that was given another one since refuses."""
    trunk: bytes
    latents: Tensor
    """(rows, latent)"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "trace", "budget_ms", "expert")
        _check_trunk(self.trunk)
        _check_rows("latents", self.latents, LATENT_DTYPES)


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs of an expert for the rows of an Ask."""

    request: int
    expert: int
    compute_us: int
    """Microseconds since the Ask left the queue. The rest of the round trip is queue and network."""
    outputs: Tensor
    """(rows, outputs), float32 or float16"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "expert", "compute_us")
        _check_rows("outputs", self.outputs, ("float32", "float16"))


_REASONS = frozenset(Reason)


def microseconds(seconds: float) -> int:
    """A duration as Answer and Result carry it: whole microseconds, at most the largest that they can carry."""
    return min(int(seconds * 1e6), _LIMITS["elapsed_us"] - 1)


def refusal_detail(text: str) -> str:
    """Any text in a form that a Refuse accepts as its detail."""
    return printable(text)[:MAX_DETAIL]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Declines a request, with the reason."""

    request: int
    """Zero when it declines a Hello."""
    reason: Reason
    detail: str = ""
    """One line for people; devices do not act on it."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")
        _require(self.reason in _REASONS, "{!r} is not a refusal reason", self.reason)
        object.__setattr__(self, "reason", Reason(self.reason))  # the wire carries the number
        _require(len(self.detail) <= MAX_DETAIL, "a detail has at most {} characters", MAX_DETAIL)
        _require(self.detail.isprintable(), "a detail must be one printable line")


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks a peer whether it works. It goes through the same queue as the work, so a frozen device does not reply."""

    request: int

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a Ping."""

    request: int
    """The number of the Ping."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Leave:
    """The sender shuts down: send it no more requests."""

    device: str

    def __post_init__(self) -> None:
        _check_name(self.device)


@dataclass(frozen=True, slots=True)
class Status:
    """Asks for counters, peers and versions, for people to read."""

    request: int

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Report:
    """Answers a Status."""

    request: int
    facts: str
    """A JSON object. Its keys are not part of the wire format, and no device depends on them."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")
        _require(self.facts.isascii(), "a report's facts must be ASCII; escape other characters in the JSON")
        try:
            facts = parse_json(self.facts)
        except ValueError as error:
            raise LocalProtocolError(str(error)) from error
        _require(isinstance(facts, dict), "a report's facts must be a JSON object")


@dataclass(frozen=True, slots=True)
class Infer:
    """A client's inputs, for the fleet to classify."""

    request: int
    trace: int
    budget_ms: int
    """Milliseconds that the client waits."""
    inputs: Tensor
    """(rows, …), as in the bundle's manifest"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "trace", "budget_ms")
        _require(self.inputs.dtype != "int8", "inputs cannot be sent as int8, which has scales")


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """Which experts the output of one row comes from."""

    experts: tuple[int, ...]
    """Those that answered, heaviest first. Empty when even the device's own expert failed: the output is then zeros."""
    weights: tuple[float, ...]
    """One for each of `experts`, summing to 1."""
    missing: tuple[int, ...] = ()
    """Experts that the gate wanted but that are not in the output; any makes the row degraded."""

    def __post_init__(self) -> None:
        _require(len(self.experts) == len(self.weights), "expected one weight for each answering expert")
        _require(len(self.experts) <= MAX_ANSWERED, "more than {} experts answer a row", MAX_ANSWERED)
        _require(len(self.missing) <= MAX_ANSWERED, "more than {} experts are missing in a row", MAX_ANSWERED)
        named = self.experts + self.missing
        _require(len(set(named)) == len(named), "an expert is named twice in a row")
        _require(
            all(isinstance(e, int) and 0 <= e < MAX_EXPERTS for e in named),
            "the experts {} are not all in 0..{}",
            named,
            MAX_EXPERTS - 1,
        )
        _require(all(0 <= w <= 1 for w in self.weights), "a weight is not in 0..1")
        total = math.fsum(self.weights)
        _require(not self.weights or abs(total - 1) < 1e-3, "a row's weights sum to {}, not to 1", total)

    @property
    def degraded(self) -> bool:
        """Whether an expert that the gate wanted is missing, or none answered."""
        return bool(self.missing) or not self.experts


@dataclass(frozen=True, slots=True)
class Result:
    """Answers an Infer: an output for every row, also when peers failed."""

    request: int
    elapsed_us: int
    """Microseconds since the Infer arrived."""
    outputs: Tensor
    """(rows, outputs), float32"""
    rows: tuple[RowAnswer, ...]

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "elapsed_us")
        _check_rows("outputs", self.outputs, ("float32",))
        _require(len(self.rows) == self.outputs.rows, "{} outputs, but {} rows", self.outputs.rows, len(self.rows))


Message = Hello | Welcome | Ask | Answer | Refuse | Ping | Pong | Leave | Status | Report | Infer | Result
