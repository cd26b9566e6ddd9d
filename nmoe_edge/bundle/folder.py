"""Reads and writes a bundle: the folder that export writes and a device reads. BUNDLE.md describes the format.

Reading verifies every file before using it and reads each file once, so the verified bytes are the bytes that are
used. This module does not run the graphs; models.py does.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.bundle.manifest import GRAPHS, OPTIONAL, REQUIRED, STATISTICS, Manifest, parse_manifest, sha256
from nmoe_edge.bundle.onnxfile import read_onnx
from nmoe_edge.bundle.selftest import SelfTest, parse_selftest
from nmoe_edge.bundle.statistics import parse_statistics
from nmoe_edge.common.folders import staged_folder
from nmoe_edge.errors import BundleError
from nmoe_edge.protocol.familiar import Familiar

MANIFEST = "manifest.json"
FILES = "|".join(map(re.escape, (MANIFEST, *REQUIRED, *OPTIONAL)))
"""Regular expression of the file names that a bundle may contain."""


@dataclass(frozen=True, slots=True)
class BundleCaps:
    """How many bytes of a bundle a device reads into memory at most."""

    manifest_bytes: int = 1024 * 1024
    bundle_bytes: int = 512 * 1024 * 1024
    """Of all files except the manifest together."""


DEFAULT_CAPS = BundleCaps()


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A verified bundle in memory. Delete it once the sessions are open: it keeps the bytes of the graphs."""

    manifest: Manifest
    contents: Mapping[str, bytes]
    """File name -> verified bytes."""
    selftest: SelfTest
    familiar: Familiar | None = None
    """How familiar latents lie; None where the manifest has no `routing.familiar`."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The name of each output; None if the bundle has no labels.txt."""
        text = self.contents.get("labels.txt")
        return None if text is None else tuple(text.decode().removesuffix("\n").split("\n"))


def read_bundle(folder: Path | str, caps: BundleCaps = DEFAULT_CAPS) -> Bundle:
    """Read and verify a bundle; BundleError names the first file with a problem."""
    folder = Path(folder)
    while True:
        with _open_folder(folder) as directory:
            try:
                return _read(folder, directory, caps)
            except BundleError:
                # If the folder was replaced while we read it, read the new one.
                unchanged = not folder.is_dir() or os.path.samestat(os.fstat(directory), folder.stat())
                if unchanged:
                    raise


def _read(folder: Path, directory: int, caps: BundleCaps) -> Bundle:
    with _translate_errors(folder / MANIFEST):
        manifest = parse_manifest(_read_file(directory, MANIFEST, caps.manifest_bytes))
        announced = sum(entry.bytes for entry in manifest.files.values())
        if announced > caps.bundle_bytes:
            raise ValueError(f"lists {announced} bytes of files, more than the {caps.bundle_bytes} allowed")
    stray = sorted(set(os.listdir(directory)) - set(manifest.files) - {MANIFEST})
    if stray:
        raise BundleError(f"{folder}: holds {stray[0]!r}, which its manifest does not list; remove it")
    contents = {}
    for name, entry in manifest.files.items():
        with _translate_errors(folder / name):
            data = _read_file(directory, name, entry.bytes)
            if len(data) != entry.bytes:
                raise ValueError(f"{len(data)} bytes, but the manifest lists {entry.bytes}; copy it again")
            if sha256(data) != entry.sha256:
                raise ValueError("its sha256 differs from the manifest's; copy it again")
            contents[name] = data
    return _check_contents(folder, manifest, contents)


def write_bundle(folder: Path | str, manifest: Manifest, contents: Mapping[str, bytes]) -> Bundle:
    """Write a bundle: the files `contents`, and `manifest` with their sizes and digests filled in.

    The bundle is written to a temporary folder, read back and verified, and then replaces `folder` in one step.
    """
    folder = Path(folder)
    with _translate_errors(folder), staged_folder(folder, MANIFEST, FILES) as staging:
        for name, data in {**contents, MANIFEST: manifest.seal(contents).render()}.items():
            (staging / name).write_bytes(data)
        try:
            return read_bundle(staging)
        except BundleError as error:
            raise BundleError(str(error).replace(str(staging), str(folder))) from error


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: not a bundle: {_reason(error)}") from error
    try:
        yield directory
    finally:
        os.close(directory)


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Turn ValueError and OSError into a BundleError that names `path`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _read_file(directory: int, name: str, max_bytes: int) -> bytes:
    """Read a plain file of the folder opened as `directory`, at most `max_bytes`. Refuses links, pipes and folders."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise ValueError("a link; a bundle may contain plain files only") from error
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > max_bytes:
            raise ValueError(f"{status.st_size} bytes, more than the {max_bytes} expected")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(handle)


def _check_contents(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Bundle:
    """Check that graphs, self-test, statistics and labels match the manifest."""
    for name in GRAPHS:
        with _translate_errors(folder / name):
            facts = read_onnx(contents[name])
            if facts.external_data:
                raise ValueError("keeps tensors outside the file; export it with every tensor inside")
            if (facts.opset, facts.ir_version) != (manifest.opset, manifest.ir_version):
                raise ValueError(
                    f"opset {facts.opset} and IR {facts.ir_version},"
                    f" not the manifest's {manifest.opset} and {manifest.ir_version}"
                )
    with _translate_errors(folder / "selftest.npz"):
        selftest = parse_selftest(contents["selftest.npz"], manifest)
    familiar = None
    if STATISTICS in contents:
        with _translate_errors(folder / STATISTICS):
            familiar = parse_statistics(contents[STATISTICS], manifest)
    bundle = Bundle(manifest, contents, selftest, familiar)
    with _translate_errors(folder / "labels.txt"):
        labels = bundle.labels
        if labels is not None and len(labels) != manifest.outputs:
            raise ValueError(f"{len(labels)} labels for {manifest.outputs} outputs")
        if labels is not None and not all(label.isprintable() for label in labels):
            raise ValueError("a label contains unprintable characters")
    return bundle
