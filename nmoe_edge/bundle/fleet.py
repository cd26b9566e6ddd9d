"""Who the devices of a fleet are: fleet.toml, and the folder of bundles that it stands in.

BUNDLE.md explains every key. It knows neither keys on disk nor sockets: a public key here is text.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.bundle.folder import FILES as BUNDLE_FILES
from nmoe_edge.bundle.folder import Bundle, read_bundle
from nmoe_edge.common.files import replace_file
from nmoe_edge.common.limits import MAX_EXPERTS, check_device_name
from nmoe_edge.common.schema import from_plain
from nmoe_edge.errors import FleetError

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

SCHEMA = 1
FILES = rf"fleet\.toml|[A-Za-z0-9][A-Za-z0-9_.-]*/({BUNDLE_FILES})"
"""What a fleet's folder may hold, as a regular expression."""
_COMMON: dict[str, Callable[[Bundle], object]] = {
    "trunks": lambda bundle: bundle.manifest.trunk,
    "lists of labels": lambda bundle: bundle.labels,
    "combinations": lambda bundle: bundle.manifest.routing.combination,
    "kinds of answers, with and without a prior": lambda bundle: bundle.manifest.answers_carry_prior,
}
"""What all devices of a fleet must have in common to combine their answers."""
FLEET_FILE = "fleet.toml"
MAX_FLEET_BYTES = 1024 * 1024

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]+(%\w+)?\]|[A-Za-z0-9][A-Za-z0-9.-]*):(?P<port>[1-9][0-9]{0,4})")
_Z85_KEY = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


_PORT = re.compile(r"tcp://[^\s/]+:(\*|[0-9]{1,5})")


def port_of(address: str) -> int | None:
    """The port of tcp://HOST:PORT, 0 for * and any; None where it is no such address, or there is no such port."""
    match = _PORT.fullmatch(address)
    port = None if match is None else 0 if match[1] == "*" else int(match[1])
    return port if port is not None and port <= 65535 else None  # libzmq would take its lowest 16 bits


_LOOPBACK = re.compile(r"tcp://(127(\.\d+){3}|localhost|\[::1\]):(\d+|\*)")


def is_loopback(address: str) -> bool:
    """Whether only this very machine is behind it."""
    return _LOOPBACK.fullmatch(address) is not None


_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def _is_key(text: str) -> bool:
    """Whether it is 32 bytes in Z85: five characters may say more than four bytes hold."""
    if not _Z85_KEY.fullmatch(text):
        return False
    fives = (text[at : at + 5] for at in range(0, 40, 5))
    return all(sum(_Z85.index(c) * 85 ** (4 - i) for i, c in enumerate(five)) < 2**32 for five in fives)


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the fleet."""

    name: str
    """Also the name of its folder."""
    expert: int
    address: str
    """tcp://HOST:PORT, where its peers reach it."""
    bundle: str
    """The digest of its bundle's manifest, which pins every byte of it."""
    public_key: str | None = None
    """Its CURVE key in Z85, 40 characters; without one the device serves on loopback only."""

    def __post_init__(self) -> None:
        check_device_name(self.name)
        _require(self.name != FLEET_FILE, f"name: {FLEET_FILE} is the file's own")
        _require(0 <= self.expert < MAX_EXPERTS, f"expert is {self.expert}, not in 0..{MAX_EXPERTS - 1}")
        match = _ADDRESS.fullmatch(self.address)
        sound = match is not None and int(match["port"]) <= 65535
        _require(sound, f"address is {self.address[:80]!r}, not tcp://HOST:PORT with a port in 1..65535")
        _require(bool(_DIGEST.fullmatch(self.bundle)), "bundle is not 64 hexadecimal digits")
        key = self.public_key
        _require(key is None or _is_key(key), "public_key is not 40 characters of Z85")


@dataclass(frozen=True, slots=True)
class Fleet:
    """fleet.toml."""

    schema: int
    device: tuple[Device, ...]
    """In TOML one [[device]] each."""

    def __post_init__(self) -> None:
        _require(self.schema == SCHEMA, f"schema {self.schema} is unknown: this nmoe reads schema {SCHEMA}")
        _require(len(self.device) > 0, "no [[device]] stands in it")
        for what in ("name", "expert", "address", "public_key"):
            counts = Counter(getattr(device, what) for device in self.device)
            twice = [value for value, count in counts.items() if count > 1 and value is not None]
            _require(not twice, f"two devices have the same {what} {twice[0] if twice else ''!r}")

    def named(self, name: str) -> Device:
        """The device of this name; FleetError when there is none."""
        for device in self.device:
            if device.name == name:
                return device
        raise FleetError(f"no device is named {name!r}; there are {', '.join(d.name for d in self.device)}")

    def at(self, place: str) -> Device:
        """The device of this name or at this address; FleetError when there is none."""
        for device in self.device:
            if place in (device.name, device.address):
                return device
        there = ", ".join(f"{device.name} at {device.address}" for device in self.device)
        raise FleetError(f"no device is {place!r}, by its name or its address; there are {there}")

    def render(self) -> str:
        """fleet.toml, in the one way in which it is written."""
        lines = [f"schema = {self.schema}"]
        for device in self.device:
            # JSON's strings are TOML's basic strings, for what the checks above let through.
            lines += ["", "[[device]]", f"name = {json.dumps(device.name)}", f"expert = {device.expert}"]
            lines += [f"address = {json.dumps(device.address)}", f"bundle = {json.dumps(device.bundle)}"]
            if device.public_key is not None:
                lines.append(f"public_key = {json.dumps(device.public_key)}")
        return "\n".join(lines) + "\n"


def fleet_file(given: Path) -> Path:
    """The fleet.toml that was named, or that lies in the folder that was."""
    return given / FLEET_FILE if os.path.isdir(given) else given


def parse_fleet(text: str) -> Fleet:
    """fleet.toml, or ValueError."""
    return from_plain(Fleet, tomllib.loads(text))


def read_fleet(path: Path | str) -> Fleet:
    """Read fleet.toml; FleetError says what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FLEET_BYTES + 1)
        if len(data) > MAX_FLEET_BYTES:
            raise ValueError(f"more than {MAX_FLEET_BYTES} bytes")
        return parse_fleet(data.decode())
    except OSError as error:
        raise FleetError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FleetError(f"{path}: {error}") from error


def write_fleet(path: Path, fleet: Fleet) -> None:
    """Replace fleet.toml: a reader sees the old one or the new one."""
    try:
        replace_file(path, fleet.render())
    except OSError as error:
        raise FleetError(f"{path}: cannot be written: {error.strerror}") from error


def read_fleet_folder(folder: Path | str) -> tuple[Fleet, dict[str, Bundle]]:
    """A fleet and the verified bundle of each of its devices that is here, all of one trunk.

    A board holds its own bundle only. A folder that is here and is no bundle is an error.
    """
    folder = Path(folder)
    fleet = read_fleet(folder / FLEET_FILE)
    here = [device for device in fleet.device if os.path.lexists(folder / device.name)]
    if not here:
        raise FleetError(f"{folder}: of no device that {FLEET_FILE} names is the bundle here; copy one beside it")
    bundles = {device.name: read_bundle(folder / device.name) for device in here}
    for what, value in _COMMON.items():
        found = {value(bundle) for bundle in bundles.values()}
        if len(found) > 1:
            raise FleetError(f"{folder}: the devices have {len(found)} different {what}; they cannot answer each other")
    for device in here:
        manifest = bundles[device.name].manifest
        if manifest.digest != device.bundle:
            raise FleetError(f"{folder / device.name}: not the bundle that {FLEET_FILE} names; copy it again")
        if (manifest.device, manifest.expert) != (device.name, device.expert):
            raise FleetError(f"{folder / device.name}: of device {manifest.device}, expert {manifest.expert}")
    return fleet, bundles
