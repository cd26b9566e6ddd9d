"""The status report of a device: its parts, their types and units.

`Node.status()` and `Client.status()` return a StatusReport, and `nmoe-edge status --json` prints it. Over the wire it
is JSON, so a device of another version may send other keys; only the shape of the JSON text is checked.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class InputReport(TypedDict):
    """One input of the model, as in the bundle's manifest."""

    dtype: Literal["uint8", "float32", "int64"]
    shape: list[int]
    """The dimensions of one row."""
    layout: Literal["CHW", "HWC", "none"]
    """The order of an image's dimensions; none: the input is not an image."""
    resize: Literal["exact", "stretch", "crop"]
    """How an image of another size is fitted."""
    range: list[float]
    """The lowest and the highest value of the inputs that the model was calibrated on."""


class RulesReport(TypedDict):
    """How the device answers at present."""

    top_k: int
    """Experts that a row is sent to."""
    local_first: float
    """Confidence above which a row is answered locally, 0 to 1; 1: the gate alone decides."""
    familiar: float | None
    """Largest distance of a latent that local-first answers; None: not tested."""
    latents: Literal["int8", "float16", "float32"]
    """The type in which latents travel."""
    deadline_s: float
    """Seconds that a request may take at most."""
    prefer_near: float
    """Gate score that a peer loses per millisecond."""
    hedge: bool
    """Whether another expert is asked when one is late."""


class ClassMixReport(TypedDict):
    """What the device has learned about the classes that it sees."""

    adapt: bool
    """Whether answers are weighted with the class mix."""
    rows: int
    """Answered rows that it is estimated from."""
    mix: list[float] | None
    """The share of every class; their sum is 1. None until 100 rows were seen."""


class PeerReport(TypedDict):
    """One peer, as this device sees it."""

    name: str
    expert: int
    address: str
    """Where it is asked now, tcp://HOST:PORT."""
    state: Literal["unknown", "alive", "silent", "lost", "wrong", "foreign", "left"]
    """Only an `alive` peer is asked."""
    rtt_ms: float | None
    """Smoothed round trip of an Ask in milliseconds, the peer's work included; None until it has answered one."""
    p95_ms: float | None
    """95th percentile of its last round trips in milliseconds; None while there are too few."""
    asked: int
    """Asks sent to it."""
    answered: int
    """Answers it gave."""
    refused: int
    """Asks it refused."""
    owed: int
    """Asks and Pings that it still has to reply to."""
    bundle: str
    """The first 12 hex digits of its bundle's digest; empty until it has been alive."""


class DurationReport(TypedDict):
    """How often something was timed, and its percentiles in milliseconds (within nine percent)."""

    count: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None


class StatusReport(TypedDict):
    """Everything that a device reports about itself."""

    device: str
    """Its name in fleet.toml."""
    expert: int
    """The number of its own expert."""
    experts: int
    """Experts in the fleet."""
    address: str
    """Where it listens, tcp://HOST:PORT; empty when it does not."""
    bundle: str
    """The digest of its bundle, in hex."""
    trunk: str
    """Identifies the trained extractor and the gate's shape, in hex. Only devices of the same trunk ask each other."""
    provider: str
    """The onnxruntime provider that runs the extractor."""
    threads: int
    """CPU threads of each graph."""
    extractor: Literal["fp32", "fp16", "int8"]
    """The extractor's precision."""
    known_keys: int | None
    """Keys that may connect; None: the device serves without keys."""
    uptime_s: float
    """Seconds since it was ready."""
    under_way: int
    """Requests that are not answered yet."""
    version: str
    """The version of nmoe."""
    input: InputReport
    combination: Literal["outputs", "probabilities"]
    """What is summed over experts: their outputs, or the softmax of each."""
    labels: list[str]
    """The name of every output; empty when the bundle has none."""
    rules: RulesReport
    class_mix: ClassMixReport
    peers: list[PeerReport]
    """The other devices of the fleet, by expert."""
    counts: dict[str, int]
    """Counters above zero; SERVING.md lists them."""
    took: dict[str, DurationReport]
    """Durations that occurred; SERVING.md lists them."""
