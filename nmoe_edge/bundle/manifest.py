"""manifest.json: the description of a bundle, which export writes and a device reads. BUNDLE.md explains every key.

Pure data, validated when it is created, with exactly one JSON form. folder.py reads and writes the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nmoe_edge.common.limits import MAX_ANSWERED, MAX_EXPERTS, check_device_name
from nmoe_edge.common.schema import from_plain, nearest, parse_json, require, to_plain
from nmoe_edge.protocol.messages import TRUNK_BYTES
from nmoe_edge.protocol.tensor import MAX_DIMS

SCHEMA = 2
"""What is written."""
SCHEMAS = (1, SCHEMA)
"""What is read. Schema 1 has no `familiar` and no familiar.npz."""

GRAPHS = ("extractor.onnx", "gate.onnx", "expert.onnx")
REQUIRED = (*GRAPHS, "selftest.npz")
STATISTICS = "familiar.npz"
OPTIONAL = ("labels.txt", STATISTICS)

_SEAL = re.compile(rb'"digest": "([0-9a-f]{64})"\n}\n\Z')
"""The end of every manifest. The digest covers the bytes, so a manifest without a newer optional key stays valid."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEASURE = re.compile(r"[a-z0-9_.-]{1,60}")


def sha256(data: bytes) -> str:
    """The sha256 of a file as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def trunk_digest(extractor_source: str, latent_dim: int, experts: int, outputs: int) -> str:
    """Identify what two devices must share to exchange latents: the trained extractor and three sizes.

    The gate's weights (they may be personal) and the extractor's precision (it may differ by board) are not included.
    """
    text = json.dumps([extractor_source, latent_dim, experts, outputs])
    return hashlib.sha256(text.encode()).digest()[:TRUNK_BYTES].hex()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and digest of one file of the bundle."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        require(self.bytes >= 0, f"bytes is {self.bytes}, less than 0")
        require(bool(_SHA256.fullmatch(self.sha256)), "sha256 is not 64 hexadecimal digits")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Dtype and shape of one input row, and how an image is converted to it."""

    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int, ...]
    """Shape of one row, without the batch dimension."""
    layout: Literal["CHW", "HWC", "none"]
    """Order of the dimensions of an image; `none` for other data."""
    resize: Literal["exact", "stretch", "crop"]
    """What to do with an image of another size.

    exact: refuse it; stretch: scale it to the shape; crop: scale it to cover the shape, keep the centre.
    """
    range: tuple[float, ...]
    """Lowest and highest value of the inputs that the model was calibrated on."""

    def __post_init__(self) -> None:
        require(1 <= len(self.shape) <= MAX_DIMS, f"shape {list(self.shape)} must have 1 to {MAX_DIMS} dimensions")
        require(min(self.shape) >= 1, f"shape {list(self.shape)} has an empty dimension")
        require(self.layout == "none" or len(self.shape) == 3, f"layout {self.layout} needs three dimensions")
        require(self.layout != "none" or self.resize == "exact", "resize must be exact where layout is none")
        require(len(self.range) == 2 and self.range[0] < self.range[1], "range must be [lowest, highest]")


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """The latents that devices send each other."""

    dim: int
    dtype: Literal["int8", "float16", "float32"]
    """Dtype on the wire; int8 adds one scale per row."""

    def __post_init__(self) -> None:
        require(self.dim >= 1, f"dim is {self.dim}, less than 1")


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """How rows are routed and answers combined; export chooses it on held-out data."""

    top_k: int
    """Experts per row."""
    combination: Literal["outputs", "probabilities"]
    """What is averaged with the gate's weights: the experts' outputs, or the softmax of each."""
    local_first: float | None = None
    """A row is answered locally if the own expert's confidence is above this; null: the gate alone decides."""
    adapt: bool = False
    """Whether the device estimates its class mix and multiplies answers by it; needs answers without a prior."""
    familiar: float | None = None
    """A row is answered locally only if its latent is at most this far from those in familiar.npz; null: not tested."""

    def __post_init__(self) -> None:
        require(1 <= self.top_k <= MAX_ANSWERED, f"top_k is {self.top_k}, not in 1..{MAX_ANSWERED}")
        threshold = self.local_first
        require(threshold is None or 0 <= threshold <= 1, f"local_first is {threshold}, not in 0..1")
        limit = self.familiar
        require(limit is None or 0 <= limit < float("inf"), f"familiar is {limit}; expected a finite number, 0 or more")


@dataclass(frozen=True, slots=True)
class PrecisionSpec:
    """The precision that each graph computes in."""

    extractor: Literal["fp32", "fp16", "int8"]
    gate: Literal["fp32", "fp16", "int8"]
    expert: Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    schema: int
    device: str
    experts: int
    """Experts in the whole fleet: the width of the gate."""
    expert: int
    """Number of this device's own expert, from 0."""
    outputs: int
    """Numbers in an answer; for a classifier, its classes."""
    answers_carry_prior: bool
    """Whether answers favour the classes that the expert saw most in training; false for logit-adjusted experts."""
    input: InputSpec
    latent: LatentSpec
    routing: RoutingSpec
    precision: PrecisionSpec
    target: Literal["any", "x86", "pi", "jetson"]
    """The export profile."""
    opset: int
    ir_version: int
    accuracy: Mapping[str, float]
    """Accuracy measured at export: name -> value in 0..1; empty without data to measure on."""
    extractor_source: str
    """Digest of the trained extractor, its weights and architecture; not of an exported file."""
    trunk: str
    """trunk_digest of the fields above."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    digest: str = ""
    """sha256 of manifest.json without these 64 characters: identifies the whole bundle. Always the last key."""

    def __post_init__(self) -> None:
        require(self.schema in SCHEMAS, _unknown_schema(self.schema))
        require(self.schema > 1 or self.routing.familiar is None, "routing.familiar needs schema 2")
        check_device_name(self.device)
        require(1 <= self.experts <= MAX_EXPERTS, f"experts is {self.experts}, not in 1..{MAX_EXPERTS}")
        require(0 <= self.expert < self.experts, f"expert is {self.expert}, not in 0..{self.experts - 1}")
        require(self.outputs >= 1, f"outputs is {self.outputs}, less than 1")
        require(
            self.routing.top_k <= self.experts, f"top_k is {self.routing.top_k}, more than the {self.experts} experts"
        )
        require(not (self.routing.adapt and self.answers_carry_prior), "adapt needs answers without a prior")
        require(bool(_SHA256.fullmatch(self.extractor_source)), "extractor_source is not 64 hexadecimal digits")
        expected = trunk_digest(self.extractor_source, self.latent.dim, self.experts, self.outputs)
        require(self.trunk == expected, f"trunk is {self.trunk}; expected {expected}")
        for name, share in self.accuracy.items():
            require(bool(_MEASURE.fullmatch(name)), f"accuracy {name!r} must have a name of a-z, 0-9, '_', '.' and '-'")
            require(0 <= share <= 1, f"accuracy {name!r} is {share}, not in 0..1")
        for name in self.files:
            require(name in REQUIRED + OPTIONAL, f"unknown file {name!r:.80}{nearest(name, REQUIRED + OPTIONAL)}")

    @property
    def trunk_bytes(self) -> bytes:
        """The trunk digest in the form that messages use."""
        return bytes.fromhex(self.trunk)

    def render(self) -> bytes:
        """The bytes of manifest.json."""
        return (json.dumps(to_plain(self), indent=2) + "\n").encode()

    def seal(self, contents: Mapping[str, bytes]) -> Manifest:
        """A copy with the sizes and digests of `contents`, and its own digest."""
        files = {name: FileEntry(len(data), sha256(data)) for name, data in sorted(contents.items())}
        unsealed = replace(self, files=files, digest="")
        return replace(unsealed, digest=sha256(unsealed.render()))


def parse_manifest(data: bytes) -> Manifest:
    """Parse manifest.json; ValueError for invalid JSON, another schema, or a file changed since it was written."""
    plain = parse_json(data)
    if isinstance(plain, dict) and plain.get("schema", SCHEMA) not in SCHEMAS:
        # Check the schema before the keys: another schema has other keys.
        raise ValueError(_unknown_schema(plain["schema"]))
    manifest = from_plain(Manifest, plain)
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise ValueError(f"files does not list {', '.join(missing)}")
    if (manifest.routing.familiar is not None) != (STATISTICS in manifest.files):
        raise ValueError(f"routing.familiar and the file {STATISTICS} need each other")
    if not _is_sealed(data, manifest.digest):
        raise ValueError("its digest differs: it was changed after it was written; copy or export it again")
    return manifest


def _unknown_schema(schema: object) -> str:
    return f"schema {schema!r:.40} is unknown: this nmoe reads schemas {' and '.join(map(str, SCHEMAS))}"


def _is_sealed(data: bytes, digest: str) -> bool:
    """Whether manifest.json ends with `digest`, and that is the sha256 of all its other bytes."""
    seal = _SEAL.search(data)
    if seal is None or seal[1] != digest.encode():
        return False
    without_digest = data[: seal.start(1)] + data[seal.end(1) :]
    return sha256(without_digest) == digest
