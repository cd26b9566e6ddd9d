"""A bundle: the folder that export writes and a device reads. BUNDLE.md says the same to people.

Reading verifies before it trusts, and reads every file once: what was verified is what is opened. It knows what lies
in the folder, not how to run it; models.py does.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.bundle.manifest import GRAPHS, OPTIONAL, REQUIRED, Manifest, parse_manifest, sha256
from nmoe_edge.bundle.onnxfile import read_onnx
from nmoe_edge.common.folders import staged_folder
from nmoe_edge.common.npz import read_npz, write_npz
from nmoe_edge.errors import BundleError

MANIFEST = "manifest.json"
FILES = "|".join(map(re.escape, (MANIFEST, *REQUIRED, *OPTIONAL)))
"""What a bundle's folder may hold, as a regular expression."""


@dataclass(frozen=True, slots=True)
class BundleCaps:
    """How much of a bundle a device is willing to read into memory."""

    manifest_bytes: int = 1024 * 1024
    bundle_bytes: int = 512 * 1024 * 1024
    """Of all its files together."""


DEFAULT_CAPS = BundleCaps()


@dataclass(frozen=True, slots=True, eq=False)
class SelfTest:
    """What the exporter saw, for a device to see again on its own CPU."""

    inputs: NDArray[Any]
    """(n, *input shape)"""
    latents: NDArray[np.float32]
    """(n, latent): what the extractor made of them"""
    experts: NDArray[np.int64]
    """(n, k): whom the gate chose, the best first"""
    outputs: NDArray[np.float32]
    """(n, outputs): what this device's expert said to the latents"""
    latent_tolerance: NDArray[np.float64]
    """(): the largest absolute difference that another CPU may show"""
    output_tolerance: NDArray[np.float64]
    """(): the same for the outputs"""

    def write(self) -> bytes:
        """selftest.npz."""
        return write_npz({field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A verified bundle in memory. Drop it when the sessions are open: it holds the models' bytes."""

    manifest: Manifest
    contents: Mapping[str, bytes]
    """By file name, each as the manifest's digest says."""
    selftest: SelfTest

    @property
    def labels(self) -> tuple[str, ...] | None:
        """A name for each output, or None."""
        text = self.contents.get("labels.txt")
        return None if text is None else tuple(text.decode().removesuffix("\n").split("\n"))


def read_bundle(folder: Path | str, caps: BundleCaps = DEFAULT_CAPS) -> Bundle:
    """Read and verify a bundle; BundleError names the file that is not as it should be, and why."""
    folder = Path(folder)
    while True:
        with _opened_folder(folder) as directory:
            try:
                return _read(folder, directory, caps)
            except BundleError:
                # Swapped for another while it was being read: what was opened is not what stands there now.
                if not folder.is_dir() or os.path.samestat(os.fstat(directory), folder.stat()):
                    raise


def _read(folder: Path, directory: int, caps: BundleCaps) -> Bundle:
    with _blamed(folder / MANIFEST):
        manifest = parse_manifest(_read_file(directory, MANIFEST, caps.manifest_bytes))
        announced = sum(entry.bytes for entry in manifest.files.values())
        if announced > caps.bundle_bytes:
            raise ValueError(f"{announced} bytes of files, more than the {caps.bundle_bytes} that are allowed")
    stray = sorted(set(os.listdir(directory)) - set(manifest.files) - {MANIFEST})
    if stray:
        raise BundleError(f"{folder}: holds {stray[0]!r}, which its manifest does not list; take it out")
    contents = {}
    for name, entry in manifest.files.items():
        with _blamed(folder / name):
            data = _read_file(directory, name, entry.bytes)
            if len(data) != entry.bytes:
                raise ValueError(f"{len(data)} bytes, not the {entry.bytes} of the manifest; copy it again")
            if sha256(data) != entry.sha256:
                raise ValueError("its sha256 is not the manifest's; copy it again")
            contents[name] = data
    return _checked(folder, manifest, contents)


def write_bundle(folder: Path | str, manifest: Manifest, contents: Mapping[str, bytes]) -> Bundle:
    """Seal `manifest` over `contents` and write both: a reader sees the whole bundle, the old one, or none.

    What was written is read back and verified before it takes its place.
    """
    folder = Path(folder)
    with _blamed(folder), staged_folder(folder, MANIFEST, FILES) as staging:
        for name, data in {**contents, MANIFEST: manifest.sealed(contents).render()}.items():
            (staging / name).write_bytes(data)
        try:
            return read_bundle(staging)
        except BundleError as error:
            raise BundleError(str(error).replace(str(staging), str(folder))) from error


@contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: no bundle: {_reason(error)}") from error
    try:
        yield directory
    finally:
        os.close(directory)


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """What goes wrong with this file or folder, as one line that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _read_file(directory: int, name: str, most_bytes: int) -> bytes:
    """A plain file of this very folder: no link is followed, no pipe waited for, no more read than announced."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise ValueError("a link; a bundle holds plain files only") from error
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > most_bytes:
            raise ValueError(f"{status.st_size} bytes, more than the {most_bytes} that were due")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most_bytes)
    finally:
        os.close(handle)


def _checked(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Bundle:
    """What the files say must be what the manifest says of them."""
    for name in GRAPHS:
        with _blamed(folder / name):
            facts = read_onnx(contents[name])
            if facts.external_data:
                raise ValueError("keeps tensors outside the file; a bundle's graphs are whole")
            if (facts.opset, facts.ir_version) != (manifest.opset, manifest.ir_version):
                raise ValueError(
                    f"opset {facts.opset} and IR {facts.ir_version},"
                    f" not the manifest's {manifest.opset} and {manifest.ir_version}"
                )
    with _blamed(folder / "selftest.npz"):
        selftest = _read_selftest(contents["selftest.npz"], manifest)
    bundle = Bundle(manifest, contents, selftest)
    with _blamed(folder / "labels.txt"):
        labels = bundle.labels
        if labels is not None and len(labels) != manifest.outputs:
            raise ValueError(f"{len(labels)} labels for {manifest.outputs} outputs")
        if labels is not None and not all(label.isprintable() for label in labels):
            raise ValueError("a label that cannot be printed")
    return bundle


def _read_selftest(data: bytes, manifest: Manifest) -> SelfTest:
    arrays = read_npz(data)
    names = [field.name for field in fields(SelfTest)]
    if sorted(arrays) != sorted(names):
        raise ValueError(f"the arrays are {', '.join(sorted(arrays))}, not {', '.join(names)}")
    rows = arrays["inputs"].shape[0] if arrays["inputs"].ndim else 0
    if rows < 1:
        raise ValueError("no inputs")
    expected = {
        "inputs": (np.dtype(manifest.input.dtype), (rows, *manifest.input.shape)),
        "latents": (np.dtype("<f4"), (rows, manifest.latent.dim)),
        "experts": (np.dtype("<i8"), (rows, manifest.routing.top_k)),
        "outputs": (np.dtype("<f4"), (rows, manifest.outputs)),
        "latent_tolerance": (np.dtype("<f8"), ()),
        "output_tolerance": (np.dtype("<f8"), ()),
    }
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if min(arrays["latent_tolerance"], arrays["output_tolerance"]) < 0:
        raise ValueError("a tolerance is less than 0")
    if arrays["experts"].min() < 0 or arrays["experts"].max() >= manifest.experts:
        raise ValueError(f"experts names one that is not in 0..{manifest.experts - 1}")
    return SelfTest(**arrays)
