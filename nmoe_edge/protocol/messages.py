"""What devices say to each other, and what a client on a device says to it.

Each message is frozen and checks itself when it is made, so one that exists is sound. How it lies on the wire is
wire.py's business; who answers what is in WIRE.md.
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
"""The version of the wire that this code speaks."""

TRUNK_BYTES = 16
MAX_DETAIL = 200
"""Characters of a refusal's detail."""

_CAPABILITY = re.compile(r"[a-z0-9][a-z0-9_.:/+-]{0,47}")
_DIGEST = re.compile(r"([0-9a-f]{64})?")


class Reason(IntEnum):
    """Why a device does not answer. The list is closed; the numbers are the wire's."""

    BUSY = 1
    """The queue is full: try another expert."""
    EXPIRED = 2
    """The budget was spent before the work began."""
    WRONG_TRUNK = 3
    """The latents come from another extractor."""
    BAD_REQUEST = 4
    """No such expert here, or rows of the wrong shape or dtype."""
    SHUTTING_DOWN = 5
    """The device drains and takes nothing new."""
    FAILED = 6
    """The work was begun and broke."""


def _require(holds: bool, text: str, *values: object) -> None:
    if not holds:
        raise LocalProtocolError(text.format(*values))


def _check_device_name(name: str) -> None:
    try:
        check_device_name(name)
    except ValueError as error:
        raise LocalProtocolError(str(error)) from error


def _check_identity(of: Hello | Welcome) -> None:
    check_device_name(of.device)
    _check_numbers(of, "expert")
    _check_trunk(of.trunk)
    sound = isinstance(of.bundle, str) and _DIGEST.fullmatch(of.bundle)
    _require(bool(sound), "{!r} is no bundle's digest", of.bundle)
    _require(isinstance(of.capabilities, tuple), "capabilities are a list")
    _require(len(of.capabilities) <= 32, "more than 32 capabilities")
    for capability in of.capabilities:
        sound = isinstance(capability, str) and _CAPABILITY.fullmatch(capability)
        _require(bool(sound), "{!r} is no capability", capability)


def _check_protocol(protocol: int) -> None:
    _require(type(protocol) is int and 0 < protocol < 256, "{!r} is no protocol version", protocol)


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
        raise LocalProtocolError(f"{what} do not travel as {tensor.dtype}")
    if len(tensor.shape) != 2:
        raise LocalProtocolError(f"{what} are (rows, {what}), not {tensor.shape}")


def _check_trunk(trunk: bytes) -> None:
    if not (isinstance(trunk, bytes) and len(trunk) == TRUNK_BYTES):
        raise LocalProtocolError(f"a trunk digest has {TRUNK_BYTES} bytes, not {trunk!r}")


@dataclass(frozen=True, slots=True)
class Hello:
    """The first word to a peer: who I am and which latents I make."""

    device: str
    expert: int
    trunk: bytes
    capabilities: tuple[str, ...] = ()
    """What this device can do beyond the version's least, such as `latent:int8`; unknown ones are passed over."""
    protocols: tuple[int, ...] = (PROTOCOL,)
    """Every version that it speaks; the peer picks one."""
    bundle: str = ""
    """Digest of the bundle that it serves, so that a peer can tell which; empty when it does not say."""

    def __post_init__(self) -> None:
        _check_identity(self)
        _require(isinstance(self.protocols, tuple), "protocol versions are a list")
        _require(0 < len(self.protocols) <= 16, "a device speaks one to sixteen protocol versions")
        for protocol in self.protocols:
            _check_protocol(protocol)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to a Hello that is welcome: the same of the other side."""

    device: str
    expert: int
    trunk: bytes
    capabilities: tuple[str, ...] = ()
    protocol: int = PROTOCOL
    """The version to speak from here on."""
    bundle: str = ""
    """As in a Hello."""

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_protocol(self.protocol)


@dataclass(frozen=True, slots=True)
class Ask:
    """Run your expert on these latents."""

    request: int
    """The asker's number, never used twice: it counts from a random one, so that a restart meets no old answers."""
    trace: int
    """Carried along unread, so that logs of several devices can be joined; 0 when nobody traces."""
    budget_ms: int
    """What is left of the origin's deadline; work whose budget is spent is never begun."""
    expert: int
    """Whose answer is wanted: a device that was given another expert since refuses."""
    trunk: bytes
    latents: Tensor
    """(rows, latent)"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "trace", "budget_ms", "expert")
        _check_trunk(self.trunk)
        _check_rows("latents", self.latents, LATENT_DTYPES)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the expert said, row for row."""

    request: int
    expert: int
    compute_us: int
    """From taking the Ask off the queue to here: what is left of the round trip is the network and the queue."""
    outputs: Tensor
    """(rows, outputs), float32 or float16"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "expert", "compute_us")
        _check_rows("outputs", self.outputs, ("float32", "float16"))


_REASONS = frozenset(Reason)


def detail_of(text: str) -> str:
    """Any text, as a refusal may say it."""
    return printable(text)[:MAX_DETAIL]


@dataclass(frozen=True, slots=True)
class Refuse:
    """No answer to this request, and why."""

    request: int
    """Zero for a Hello, which has none."""
    reason: Reason
    detail: str = ""
    """One line for a person; nothing is decided by it."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")
        _require(self.reason in _REASONS, "{!r} is no reason", self.reason)
        object.__setattr__(self, "reason", Reason(self.reason))  # the wire brings a number
        _require(len(self.detail) <= MAX_DETAIL, "a detail has at most {} characters", MAX_DETAIL)
        _require(self.detail.isprintable(), "a detail is one printable line")


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you working? Answered through the same queue as the work, so that a frozen device looks dead."""

    request: int

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Pong:
    """I am."""

    request: int
    """The Ping's."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Leave:
    """I am going: ask me nothing more."""

    device: str

    def __post_init__(self) -> None:
        _check_device_name(self.device)


@dataclass(frozen=True, slots=True)
class Status:
    """How are you? A person's question."""

    request: int

    def __post_init__(self) -> None:
        _check_numbers(self, "request")


@dataclass(frozen=True, slots=True)
class Report:
    """The answer to a Status: counters, peers, versions."""

    request: int
    facts: str
    """A JSON object. Its keys are the device's to choose; nothing but a screen depends on them."""

    def __post_init__(self) -> None:
        _check_numbers(self, "request")
        _require(self.facts.isascii(), "a report's facts are ASCII: JSON escapes the rest")
        try:
            facts = parse_json(self.facts)
        except ValueError as error:
            raise LocalProtocolError(str(error)) from error
        _require(isinstance(facts, dict), "a report's facts are a JSON object")


@dataclass(frozen=True, slots=True)
class Infer:
    """A client's inputs, for the fleet to answer."""

    request: int
    trace: int
    budget_ms: int
    """How long the client will wait."""
    inputs: Tensor
    """(rows, …) as the bundle's manifest describes them"""

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "trace", "budget_ms")
        _require(self.inputs.dtype != "int8", "inputs do not travel as int8, which has scales")


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """How one row came to its output."""

    experts: tuple[int, ...]
    """Who answered, the heaviest first; empty when nobody did, not even the local expert: the output is then zeros."""
    weights: tuple[float, ...]
    """Of each of them in the output; their sum is 1."""
    missing: tuple[int, ...] = ()
    """Whom the gate wanted and who is not in the output: any makes the row degraded."""

    def __post_init__(self) -> None:
        _require(len(self.experts) == len(self.weights), "every answering expert has a weight")
        _require(len(self.experts) <= MAX_ANSWERED, "more than {} experts answer a row", MAX_ANSWERED)
        _require(len(self.missing) <= MAX_ANSWERED, "more than {} experts miss in a row", MAX_ANSWERED)
        named = self.experts + self.missing
        _require(len(set(named)) == len(named), "an expert is named twice in a row")
        _require(all(isinstance(e, int) and 0 <= e < MAX_EXPERTS for e in named), "experts {} are no experts", named)
        _require(all(0 <= w <= 1 for w in self.weights), "a weight is in 0..1")
        total = math.fsum(self.weights)
        _require(not self.weights or abs(total - 1) < 1e-3, "a row's weights sum to {}, not to 1", total)

    @property
    def degraded(self) -> bool:
        """Whether the fleet answered otherwise than the gate wanted."""
        return bool(self.missing) or not self.experts


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to an Infer: every row of it, whatever happened to the peers."""

    request: int
    elapsed_us: int
    """From the Infer's arrival to here."""
    outputs: Tensor
    """(rows, outputs), float32"""
    rows: tuple[RowAnswer, ...]

    def __post_init__(self) -> None:
        _check_numbers(self, "request", "elapsed_us")
        _check_rows("outputs", self.outputs, ("float32",))
        _require(len(self.rows) == self.outputs.rows, "{} outputs, but {} rows", self.outputs.rows, len(self.rows))


Message = Hello | Welcome | Ask | Answer | Refuse | Ping | Pong | Leave | Status | Report | Infer | Result
