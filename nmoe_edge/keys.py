"""CURVE key pairs on disk: a file that its owner alone may read, beside nothing that travels.

A key file holds the secret key, 40 characters of Z85 on one line; the public key follows from it, and stands in
fleet.toml. Every device whose key stands there may ask, and nobody else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from nmoe_edge.errors import FleetError, KeyFileError
from nmoe_edge.fleet import Fleet, read_fleet

_Z85_KEY = re.compile(rb"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\n?")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A device's own."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"  # a log must not hold the secret


def make_pair() -> KeyPair:
    """A new one."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def write_key(path: Path, pair: KeyPair) -> None:
    """Keep the secret in a new file of its owner's alone; one that is there already is never written over."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w") as file:
            file.write(pair.secret + "\n")
            file.flush()
            os.fsync(handle)
    except OSError as error:  # a full disk: half a key would be in the way of the next try
        path.unlink(missing_ok=True)
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error


def read_key(path: Path) -> KeyPair:
    """The pair of a key file; one that others may read is refused."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(handle)
            data = os.read(handle, 64) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(handle)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; nmoe-edge keygen makes keys") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise KeyFileError(f"{path}: others may read it; chmod 600 {path}, or make a new one if somebody has")
    secret = data[:40]
    try:
        if not _Z85_KEY.fullmatch(data):
            raise ValueError("another length, or other characters")
        return KeyPair(zmq.curve_public(secret).decode(), secret.decode())
    except (ValueError, zmq.ZMQError):  # not every 40 characters of Z85 are 32 bytes
        raise KeyFileError(f"{path}: no key file: 40 characters of Z85 are due") from None


def key_path(fleet_file: Path, name: str) -> Path:
    """Where a device's key file is looked for: beside fleet.toml, else in the folder `…-keys` beside the fleet's."""
    beside = fleet_file.parent / f"{name}.key"
    return beside if os.path.lexists(beside) else keys_folder(fleet_file) / f"{name}.key"


def keys_folder(fleet_file: Path) -> Path:
    """Where keys are written by default: outside the fleet's folder, which is copied about and exported over."""
    folder = fleet_file.parent.resolve()
    return folder.with_name(f"{folder.name}-keys")


def keys_to(
    address: str, fleet_file: Path | None, key: Path | None, asker: str | None = None
) -> tuple[KeyPair, str] | tuple[None, None]:
    """Whom to be and whom to meet at an address: one's own pair, and the device's public key; nothing without keys.

    asker: the device that asks, where that is not the one at the address itself; key: its key file.
    """
    if fleet_file is None:
        if key is not None:
            raise FleetError("--key needs --fleet, which says what key the device has")
        return None, None
    devices = [device for device in read_fleet(fleet_file).device if device.address == address]
    if not devices:
        raise FleetError(f"{fleet_file}: no device has the address {address}")
    if devices[0].public_key is None:
        return None, None
    path = key if key is not None else key_path(fleet_file, asker if asker is not None else devices[0].name)
    return read_key(path), devices[0].public_key


def with_keys(fleet: Fleet, names: Sequence[str], folder: Path) -> Fleet:
    """Make and keep a pair for each of these devices that has none in `folder`; the fleet with their public keys."""
    pairs = {}
    for name in names:
        path = folder / f"{name}.key"
        if os.path.lexists(path):
            pairs[name] = read_key(path)
        else:
            pairs[name] = make_pair()
            write_key(path, pairs[name])
    devices = (replace(d, public_key=pairs[d.name].public) if d.name in pairs else d for d in fleet.device)
    return replace(fleet, device=tuple(devices))
