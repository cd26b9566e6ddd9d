"""A device's place in its fleet: who it is, who the others are, whose keys may come in, where it listens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.bundle.fleet import Device, is_loopback, read_fleet
from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.errors import FleetError
from nmoe_edge.keys import KeyPair, key_path, read_key


@dataclass(frozen=True, slots=True)
class Membership:
    """One device's; without a fleet it is alone and listens nowhere."""

    others: tuple[Device, ...] = ()
    keys: KeyPair | None = None
    """Its own, where the fleet has keys."""
    allowed: tuple[tuple[str, str], ...] = ()
    """Public key and device of everybody who may ask."""
    listen: str | None = None
    """Its own address; with keys, and an address that is not this host's loopback, its port on all interfaces."""


def find_membership(fleet_file: Path | None, manifest: Manifest, key: Path | None = None) -> Membership:
    """The place of this very bundle in a fleet.toml; key: its key file, where it does not lie in its usual place."""
    if fleet_file is None:
        if key is not None:
            raise FleetError("a key without a fleet.toml that says who may ask; give the fleet too")
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
                f"{fleet_file}: {device.name} at {device.address} is not loopback, and there are not keys at both ends;"
                " nmoe-edge keygen makes them"
            )
    port = me.address.rpartition(":")[2]
    return Membership(
        others=tuple(device for device in fleet.device if device is not me),
        keys=keys,
        allowed=tuple((d.public_key, d.name) for d in fleet.device if d.public_key is not None),
        listen=me.address if keys is None or is_loopback(me.address) else f"tcp://*:{port}",
    )
