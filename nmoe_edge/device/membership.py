"""What fleet.toml says about one device: its peers, its keys, the keys that may connect, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.bundle.fleet import Device, is_loopback, read_fleet
from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.errors import FleetError
from nmoe_edge.keys import KeyPair, key_path, read_key


@dataclass(frozen=True, slots=True)
class Membership:
    """One device in its fleet. The default is a device without a fleet: no peers, and it does not listen."""

    others: tuple[Device, ...] = ()
    keys: KeyPair | None = None
    """The device's own pair; None when fleet.toml has no key for it."""
    allowed: tuple[tuple[str, str], ...] = ()
    """(public key, device name) of every device that may connect."""
    listen: str | None = None
    """The address to bind: the device's own if it is loopback, else its port on all interfaces; None: do not listen."""


def find_membership(fleet_file: Path | None, manifest: Manifest, key: Path | None = None) -> Membership:
    """Read what fleet.toml says about the device of this bundle.

    key: its key file; None: the usual place. Raises FleetError when fleet and bundle do not fit or keys are missing,
    and KeyFileError when the key file cannot be used.
    """
    if fleet_file is None:
        if key is not None:
            raise FleetError("a key needs a fleet.toml, which says who may ask; give the fleet too")
        return Membership()
    fleet = read_fleet(fleet_file)
    me = fleet.named(manifest.device)
    if (me.expert, me.bundle) != (manifest.expert, manifest.digest):
        raise FleetError(f"{fleet_file}: names another bundle for {me.name} than this one; copy both again")
    keys = None
    if key is not None or me.public_key is not None:
        keys = read_key(key if key is not None else key_path(fleet_file, me.name))
        if keys.public != me.public_key:
            raise FleetError(f"{fleet_file}: the public key of {me.name} there is not that of its key file")
    for device in fleet.device:
        if not is_loopback(device.address) and (keys is None or device.public_key is None):
            raise FleetError(
                f"{fleet_file}: {device.name} at {device.address} is not loopback, so both ends need keys;"
                " nmoe-edge keygen makes them"
            )
    port = me.address.rpartition(":")[2]
    return Membership(
        others=tuple(device for device in fleet.device if device is not me),
        keys=keys,
        allowed=tuple((d.public_key, d.name) for d in fleet.device if d.public_key is not None),
        listen=me.address if keys is None or is_loopback(me.address) else f"tcp://*:{port}",
    )
