"""CURVE key pairs on disk: a file that its owner alone may read, beside nothing that travels.

A key file holds the secret key, 40 characters of Z85 on one line; the public key follows from it, and stands in
fleet.toml. Every device whose key stands there may ask, and nobody else.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from nmoe_edge.bundle.fleet import FLEET_FILE, Device, Fleet, fleet_file, read_fleet
from nmoe_edge.errors import FleetError, KeyFileError

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


def key_path(fleet_file: Path, name: str, folder: Path | None = None) -> Path:
    """Where a device's key file is looked for: beside fleet.toml, else in `folder`, or `…-keys` beside the fleet's."""
    beside = fleet_file.parent / f"{name}.key"
    return beside if os.path.lexists(beside) else (folder or keys_folder(fleet_file)) / f"{name}.key"


def keys_folder(fleet_file: Path) -> Path:
    """Where keys are written by default: outside the fleet's folder, which is copied about and exported over."""
    folder = fleet_file.parent.resolve()
    return folder.with_name(f"{folder.name}-keys")


def address_of(place: str, fleet: Path | None) -> str:
    """The address of a device of this fleet.toml that is called by its name or its address."""
    return place if fleet is None else _placed(fleet_file(fleet), place)[1].address


def keys_to(
    place: str, fleet: Path | None, key: Path | None, asker: str | None = None
) -> tuple[KeyPair, str] | tuple[None, None]:
    """Whom to be and whom to meet at a device's address or name: a pair of one's own, and the device's public key;
    nothing without keys.

    asker: the device that asks, where that is not the one at the address itself; key: its key file. Without one any
    that lies where keys are looked for and that the fleet knows will do, the asker's first.
    """
    if fleet is None:
        if key is not None:
            raise FleetError("--key needs --fleet, which says what key the device has")
        return None, None
    path = fleet_file(fleet)
    members, device = _placed(path, place)
    if device.public_key is None:
        return None, None
    known = {member.public_key for member in members.device}
    if key is not None:
        pair = read_key(key)
        if pair.public not in known:
            raise FleetError(f"{key}: the key of no device in {path}; give that of one")
        return pair, device.public_key
    return _key_here(path, asker if asker is not None else device.name, known), device.public_key


def _placed(path: Path, place: str) -> tuple[Fleet, Device]:
    fleet = read_fleet(path)
    try:
        return fleet, fleet.at(place)
    except FleetError as error:
        raise FleetError(f"{path}: {error}") from None


def _key_here(path: Path, first: str, known: Collection[str | None]) -> KeyPair:
    """The pair of a device that this fleet.toml knows, of whichever has its key file here; of `first` if it has."""
    others = (sorted(folder.glob("*.key")) for folder in (path.parent, keys_folder(path)))
    unreadable: KeyFileError | None = None
    for candidate in (key_path(path, first), *itertools.chain(*others)):
        if os.path.lexists(candidate):
            try:
                pair = read_key(candidate)
            except KeyFileError as error:
                unreadable = unreadable or error
                continue
            if pair.public in known:
                return pair
    if unreadable is not None:
        raise unreadable
    raise KeyFileError(
        f"no key file of a device in {path} lies beside it or in {keys_folder(path)}:"
        " give --key, the key file of a device that you have"
    )


def with_keys(
    fleet: Fleet, names: Sequence[str], folder: Path | None, path: Path = Path(FLEET_FILE), *, force: bool = False
) -> Fleet:
    """Make and keep a pair for each of these devices that has no key file; the fleet with their public keys.

    folder: where the files go, None for the usual one; path: the fleet.toml, beside which they may lie as well.
    force: also where that replaces a public key.
    """
    files, pairs = {name: key_path(path, name, folder) for name in names}, {}
    for name, file in files.items():
        stands = fleet.named(name).public_key
        if os.path.lexists(file):
            pairs[name] = read_key(file)
        if not force and stands is not None and (name not in pairs or pairs[name].public != stands):
            why = "is not here" if name not in pairs else "is of another key"
            raise FleetError(
                f"{path}: a public key of {name} stands there, and its key file {file} {why};"
                " copy the right one here, or --force to give it another key"
            )
    for name, file in files.items():
        if name not in pairs:
            pairs[name] = make_pair()
            write_key(file, pairs[name])
    devices = (replace(d, public_key=pairs[d.name].public) if d.name in pairs else d for d in fleet.device)
    return replace(fleet, device=tuple(devices))
