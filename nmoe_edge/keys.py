"""CURVE keys: make, write and read key files, and find the keys for a connection.

A key file contains one line with a device's secret key, 40 characters of Z85, readable by its owner only. The public
key is computed from it and listed in fleet.toml. Any device listed there may ask the others; a client uses the key of
one of them.
"""

from __future__ import annotations

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
    """A CURVE key pair, both keys as 40 characters of Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"  # the secret must not end up in a log


def make_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def write_key(path: Path, pair: KeyPair) -> None:
    """Write the secret key to a new file with mode 0600; KeyFileError if the file exists or cannot be written."""
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
    except OSError as error:  # for example a full disk; an incomplete file would block the next attempt
        path.unlink(missing_ok=True)
        raise KeyFileError(f"{path}: cannot be written: {error.strerror}") from error


def read_key(path: Path) -> KeyPair:
    """Read a key file; KeyFileError if it is missing, invalid or accessible to other users."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(handle)
            data = os.read(handle, 64) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(handle)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; copy it from where nmoe-edge keygen wrote it") from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise KeyFileError(f"{path}: others may read it; run chmod 600 {path}, or make a new key if it may have leaked")
    secret = data[:40]
    try:
        if not _Z85_KEY.fullmatch(data):
            raise ValueError("wrong length or characters")
        return KeyPair(zmq.curve_public(secret).decode(), secret.decode())
    except (ValueError, zmq.ZMQError):  # not every 40 characters of Z85 are 32 bytes
        raise KeyFileError(f"{path}: not a key file: expected 40 characters of Z85") from None


def key_path(fleet_file: Path, name: str, folder: Path | None = None) -> Path:
    """The path of a device's key file.

    That is NAME.key in the folder of fleet.toml if it exists there, else NAME.key in `folder` (default: keys_folder).
    """
    in_fleet_folder = fleet_file.parent / f"{name}.key"
    if os.path.lexists(in_fleet_folder):
        return in_fleet_folder
    return (folder or keys_folder(fleet_file)) / f"{name}.key"


def keys_folder(fleet_file: Path) -> Path:
    """The default folder of key files: FLEET-keys next to the fleet's folder, which itself is copied and replaced."""
    folder = fleet_file.parent.resolve()
    return folder.with_name(f"{folder.name}-keys")


def address_of(target: str, fleet: Path | None) -> str:
    """The address of the device that a client wants to ask.

    target: its name or address; fleet: fleet.toml or its folder, None if the target is an address already.
    """
    if fleet is None:
        return target
    _, device = _find_device(fleet_file(fleet), target)
    return device.address


def keys_to(
    target: str, fleet: Path | None, key: Path | None, asker: str | None = None
) -> tuple[KeyPair, str] | tuple[None, None]:
    """The keys for a connection: the pair of the asking side, and the public key of the device to be asked.

    target: name or address of the device to be asked; fleet: fleet.toml or its folder.
    key: the key file of the asking side; None: search the folder of fleet.toml and the keys folder for the key of any
    device in fleet.toml, first of all the key of `asker`, a device name (default: the target itself).
    Returns (None, None) for a connection without keys: no fleet given, or no public key listed for the target.
    """
    if fleet is None:
        if key is not None:
            raise FleetError("--key needs --fleet: fleet.toml contains the public key of the device")
        return None, None
    path = fleet_file(fleet)
    described, device = _find_device(path, target)
    if device.public_key is None:
        return None, None
    known = {member.public_key for member in described.device}
    if key is None:
        pair = _find_pair(path, asker if asker is not None else device.name, known)
    else:
        pair = read_key(key)
        if pair.public not in known:
            raise FleetError(f"{key}: not the key of a device in {path}; give the key file of one")
    return pair, device.public_key


def _find_device(path: Path, target: str) -> tuple[Fleet, Device]:
    """Read the fleet.toml at `path` and find the device with the name or address `target`."""
    fleet = read_fleet(path)
    try:
        return fleet, fleet.find(target)
    except FleetError as error:
        raise FleetError(f"{path}: {error}") from None


def _find_pair(path: Path, first: str, known: Collection[str | None]) -> KeyPair:
    """Find a key file for the fleet.toml at `path`: the one of the device `first`, else any with a `known` public key.

    If no file fits, the error is about the first unreadable file, if there was one.
    """
    candidates = [key_path(path, first)]
    for folder in (path.parent, keys_folder(path)):
        candidates += sorted(folder.glob("*.key"))
    unreadable: KeyFileError | None = None
    for candidate in candidates:
        if not os.path.lexists(candidate):
            continue
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
        f"no key file of a device in {path} is in its folder or in {keys_folder(path)};"
        " give the key file of a device with --key"
    )


def with_keys(
    fleet: Fleet, names: Sequence[str], folder: Path | None, path: Path = Path(FLEET_FILE), *, force: bool = False
) -> Fleet:
    """Make sure that each of the named devices has a key file, and return the fleet with their public keys.

    Existing key files are kept. FleetError if `fleet` has a public key for a device, but its key file is missing or
    contains another key; with `force` the public key is replaced instead.
    folder: where new key files go (default: keys_folder); path: the fleet.toml, also for error messages.
    """
    files = {name: key_path(path, name, folder) for name in names}
    pairs: dict[str, KeyPair] = {}
    for name, file in files.items():
        device = fleet.named(name)
        if os.path.lexists(file):
            pairs[name] = read_key(file)
        if not force:
            _check_matches(device, pairs.get(name), file, path)
    for name, file in files.items():
        if name not in pairs:
            pairs[name] = make_pair()
            write_key(file, pairs[name])
    devices = [
        replace(device, public_key=pairs[device.name].public) if device.name in pairs else device
        for device in fleet.device
    ]
    return replace(fleet, device=tuple(devices))


def _check_matches(device: Device, pair: KeyPair | None, file: Path, path: Path) -> None:
    """Raise FleetError if fleet.toml has a public key for the device and `pair`, from its key file, is not its pair."""
    if device.public_key is None or (pair is not None and pair.public == device.public_key):
        return
    why = "is missing" if pair is None else "contains another key"
    raise FleetError(
        f"{path}: it has a public key for {device.name}, but its key file {file} {why};"
        " copy the right file here, or use --force to replace the public key"
    )
