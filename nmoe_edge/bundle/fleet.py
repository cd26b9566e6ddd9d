"""fleet.toml: the devices of a fleet, and the folder that contains it and their bundles.

BUNDLE.md explains every key. Key files are in keys.py; here a public key is text.
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
from nmoe_edge.common.schema import from_plain, require
from nmoe_edge.errors import FleetError

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

SCHEMA = 1
FILES = rf"fleet\.toml|[A-Za-z0-9][A-Za-z0-9_.-]*/({BUNDLE_FILES})"
"""Regular expression of the relative paths that a fleet's folder may contain."""
_COMMON: dict[str, Callable[[Bundle], object]] = {
    "trunks": lambda bundle: bundle.manifest.trunk,
    "lists of labels": lambda bundle: bundle.labels,
    "combinations": lambda bundle: bundle.manifest.routing.combination,
    "kinds of answers, with and without a prior": lambda bundle: bundle.manifest.answers_carry_prior,
}
"""Properties that must be equal on all devices of a fleet, or their answers could not be combined."""
FLEET_FILE = "fleet.toml"
MAX_FLEET_BYTES = 1024 * 1024

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]+(%\w+)?\]|[A-Za-z0-9][A-Za-z0-9.-]*):(?P<port>[1-9][0-9]{0,4})")
"""An address to connect to: a host and a port, no wildcards."""
_PORT = re.compile(r"tcp://[^\s/]+:(\*|[0-9]{1,5})")
"""An address to listen on or to connect to; host and port can be wildcards."""
_LOOPBACK = re.compile(r"tcp://(127(\.\d+){3}|localhost|\[::1\]):(\d+|\*)")
_MAX_PORT = 65535
_DIGEST = re.compile(r"[0-9a-f]{64}")
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def port_of(address: str) -> int | None:
    """The port of tcp://HOST:PORT; 0 for the port `*`; None for another form or a port over 65535."""
    match = _PORT.fullmatch(address)
    if match is None:
        return None
    port = 0 if match[1] == "*" else int(match[1])
    return port if port <= _MAX_PORT else None  # libzmq would use the lowest 16 bits of a larger one


def is_loopback(address: str) -> bool:
    """Whether the address can be reached from this machine only."""
    return _LOOPBACK.fullmatch(address) is not None


def _is_key(text: str) -> bool:
    """Whether `text` is the Z85 form of 32 bytes: 8 groups of 5 characters, each a number below 2**32 in base 85."""
    if len(text) != 40 or not set(text) <= set(_Z85):
        return False
    return all(_z85_number(text[at : at + 5]) < 2**32 for at in range(0, 40, 5))


def _z85_number(characters: str) -> int:
    number = 0
    for character in characters:
        number = number * 85 + _Z85.index(character)
    return number


@dataclass(frozen=True, slots=True)
class Device:
    """One [[device]] of fleet.toml."""

    name: str
    """Name of the device and of the folder of its bundle."""
    expert: int
    address: str
    """tcp://HOST:PORT that its peers connect to."""
    bundle: str
    """The digest of its manifest, which identifies every byte of the bundle."""
    public_key: str | None = None
    """CURVE public key, 40 characters of Z85; without one the device serves on loopback only."""

    def __post_init__(self) -> None:
        check_device_name(self.name)
        require(self.name != FLEET_FILE, f"the name {FLEET_FILE} is reserved for the fleet file")
        require(0 <= self.expert < MAX_EXPERTS, f"expert is {self.expert}, not in 0..{MAX_EXPERTS - 1}")
        match = _ADDRESS.fullmatch(self.address)
        is_valid = match is not None and int(match["port"]) <= _MAX_PORT
        require(is_valid, f"address is {self.address[:80]!r}, not tcp://HOST:PORT with a port in 1..65535")
        require(bool(_DIGEST.fullmatch(self.bundle)), "bundle is not 64 hexadecimal digits")
        key = self.public_key
        require(key is None or _is_key(key), "public_key is not 40 characters of Z85")


@dataclass(frozen=True, slots=True)
class Fleet:
    """The content of fleet.toml."""

    schema: int
    device: tuple[Device, ...]
    """The devices, one [[device]] each in TOML."""

    def __post_init__(self) -> None:
        require(self.schema == SCHEMA, f"schema {self.schema} is unknown: this nmoe reads schema {SCHEMA}")
        require(len(self.device) > 0, "it contains no [[device]]")
        for key in ("name", "expert", "address", "public_key"):
            counts = Counter(getattr(device, key) for device in self.device)
            for value, count in counts.items():
                require(count == 1 or value is None, f"two devices have the same {key} {value!r}")

    def named(self, name: str) -> Device:
        """Find a device by its name; FleetError if the fleet does not contain it."""
        for device in self.device:
            if device.name == name:
                return device
        names = ", ".join(device.name for device in self.device)
        raise FleetError(f"no device is named {name!r}; the fleet has {names}")

    def find(self, target: str) -> Device:
        """Find a device by its name or its address; FleetError if the fleet does not contain it."""
        for device in self.device:
            if target in (device.name, device.address):
                return device
        devices = ", ".join(f"{device.name} at {device.address}" for device in self.device)
        raise FleetError(f"no device has the name or address {target!r}; the fleet has {devices}")

    def render(self) -> str:
        """The text of fleet.toml; the same fleet always gives the same text."""
        lines = [f"schema = {self.schema}"]
        for device in self.device:
            # For the characters that Device accepts, a JSON string is also a TOML string.
            lines += [
                "",
                "[[device]]",
                f"name = {json.dumps(device.name)}",
                f"expert = {device.expert}",
                f"address = {json.dumps(device.address)}",
                f"bundle = {json.dumps(device.bundle)}",
            ]
            if device.public_key is not None:
                lines.append(f"public_key = {json.dumps(device.public_key)}")
        return "\n".join(lines) + "\n"


def fleet_file(given: Path) -> Path:
    """The path of fleet.toml, from that path or from the path of its folder."""
    return given / FLEET_FILE if os.path.isdir(given) else given


def parse_fleet(text: str) -> Fleet:
    """Parse fleet.toml; ValueError for invalid TOML, unknown keys and values out of range."""
    return from_plain(Fleet, tomllib.loads(text))


def read_fleet(path: Path | str) -> Fleet:
    """Read and validate fleet.toml; FleetError for a file that cannot be read or is invalid."""
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
    """Write fleet.toml, replacing an existing one in one step; FleetError if that fails."""
    try:
        replace_file(path, fleet.render())
    except OSError as error:
        raise FleetError(f"{path}: cannot be written: {error.strerror}") from error


def read_fleet_folder(folder: Path | str) -> tuple[Fleet, dict[str, Bundle]]:
    """Read a fleet's folder: fleet.toml, and the verified bundles by the name of their device.

    Not every bundle must be present: a board has its own one only. FleetError or BundleError if a folder with the name
    of a device is not its bundle, or the bundles do not belong together.
    """
    folder = Path(folder)
    fleet = read_fleet(folder / FLEET_FILE)
    present = [device for device in fleet.device if os.path.lexists(folder / device.name)]
    if not present:
        raise FleetError(f"{folder}: no bundle of a device in {FLEET_FILE} is here; copy one into this folder")
    bundles = {device.name: read_bundle(folder / device.name) for device in present}
    for what, value in _COMMON.items():
        found = {value(bundle) for bundle in bundles.values()}
        if len(found) > 1:
            raise FleetError(f"{folder}: the devices have {len(found)} different {what}; they cannot answer each other")
    for device in present:
        manifest = bundles[device.name].manifest
        if manifest.digest != device.bundle:
            raise FleetError(f"{folder / device.name}: not the bundle that {FLEET_FILE} names; copy it again")
        if (manifest.device, manifest.expert) != (device.name, device.expert):
            raise FleetError(
                f"{folder / device.name}: the bundle of {manifest.device}, expert {manifest.expert};"
                f" {FLEET_FILE} expects {device.name}, expert {device.expert}"
            )
    return fleet, bundles
