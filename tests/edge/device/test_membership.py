from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.device.membership import Membership, find_membership
from nmoe_edge.errors import FleetError, KeyFileError
from nmoe_edge.keys import keys_folder, make_pair, with_keys, write_key

NAMES = ("attic", "barn", "cellar")


@pytest.fixture
def fleet_file(tiny_fleet, tmp_path):
    return Path(shutil.copytree(tiny_fleet, tmp_path / "fleet")) / FLEET_FILE


@pytest.fixture
def barn(tiny_fleet):
    return read_bundle(tiny_fleet / "barn").manifest


def changed(fleet_file, name, **change):
    """Change one device in fleet.toml."""
    fleet = read_fleet(fleet_file)
    devices = (replace(d, **change) if d.name == name else d for d in fleet.device)
    write_fleet(fleet_file, replace(fleet, device=tuple(devices)))


@pytest.fixture
def keyed(fleet_file):
    write_fleet(fleet_file, with_keys(read_fleet(fleet_file), NAMES, keys_folder(fleet_file)))
    return fleet_file


def test_without_a_fleet_a_device_is_alone(barn):
    assert find_membership(None, barn) == Membership((), None, (), None)


def test_a_key_without_a_fleet_is_refused(barn, tmp_path):
    with pytest.raises(FleetError, match="give the fleet too"):
        find_membership(None, barn, tmp_path / "barn.key")


def test_a_device_finds_the_others_and_its_address(fleet_file, barn):
    membership = find_membership(fleet_file, barn)
    assert [device.name for device in membership.others] == ["attic", "cellar"]
    assert (membership.keys, membership.allowed, membership.listen) == (None, (), "tcp://127.0.0.1:7102")


def test_a_device_that_fleet_toml_does_not_list_is_refused(fleet_file, barn):
    with pytest.raises(FleetError, match="no device is named 'shed'"):
        find_membership(fleet_file, replace(barn, device="shed"))


@pytest.mark.parametrize("change", [{"bundle": "0" * 64}, {"expert": 7}])
def test_another_bundle_than_fleet_toml_lists_is_refused(fleet_file, barn, change):
    changed(fleet_file, "barn", **change)
    with pytest.raises(FleetError, match="names another bundle for barn"):
        find_membership(fleet_file, barn)


def test_a_missing_fleet_is_refused(tmp_path, barn):
    with pytest.raises(FleetError, match="No such file"):
        find_membership(tmp_path / FLEET_FILE, barn)


def test_with_keys_every_device_with_a_public_key_may_connect(keyed, barn):
    membership = find_membership(keyed, barn)
    fleet = read_fleet(keyed)
    assert membership.keys.public == fleet.named("barn").public_key
    assert dict(membership.allowed) == {fleet.named(name).public_key: name for name in NAMES}


def test_a_device_without_a_public_key_may_not_connect(keyed, barn):
    changed(keyed, "attic", public_key=None)
    membership = find_membership(keyed, barn)
    assert sorted(name for _, name in membership.allowed) == ["barn", "cellar"]
    assert [device.name for device in membership.others] == ["attic", "cellar"]


def test_a_key_file_in_another_place_can_be_given(keyed, barn, tmp_path):
    usual = keys_folder(keyed) / "barn.key"
    usual.rename(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="No such file"):
        find_membership(keyed, barn)
    assert (
        find_membership(keyed, barn, tmp_path / "elsewhere").keys.public == read_fleet(keyed).named("barn").public_key
    )


def test_a_key_that_fleet_toml_does_not_list_is_refused(keyed, barn, tmp_path):
    write_key(tmp_path / "other", make_pair())
    with pytest.raises(FleetError, match="public key of barn"):
        find_membership(keyed, barn, tmp_path / "other")


def test_a_key_file_for_a_device_without_a_public_key_is_refused(fleet_file, barn, tmp_path):
    write_key(tmp_path / "other", make_pair())
    with pytest.raises(FleetError, match="public key of barn"):
        find_membership(fleet_file, barn, tmp_path / "other")


@pytest.mark.parametrize(
    ("address", "listen"),
    [
        ("tcp://127.0.0.1:7999", "tcp://127.0.0.1:7999"),
        ("tcp://localhost:7999", "tcp://localhost:7999"),
        ("tcp://[::1]:7999", "tcp://[::1]:7999"),
        ("tcp://192.0.2.7:7999", "tcp://*:7999"),
        ("tcp://barn.local:7999", "tcp://*:7999"),
        ("tcp://[fe80::1%eth0]:7999", "tcp://*:7999"),
    ],
)
def test_with_keys_a_device_listens_on_every_interface_unless_it_is_loopback(keyed, barn, address, listen):
    changed(keyed, "barn", address=address)
    assert find_membership(keyed, barn).listen == listen


def test_without_keys_a_device_never_listens_on_every_interface(fleet_file, barn):
    assert find_membership(fleet_file, barn).listen.startswith("tcp://127.0.0.1:")


def test_a_device_without_keys_has_peers_on_loopback_only(fleet_file, barn):
    """Otherwise latents would travel unencrypted, and any machine at that address could answer."""
    changed(fleet_file, "attic", address="tcp://192.0.2.7:7999")
    with pytest.raises(FleetError, match="attic at tcp://192.0.2.7:7999 is not loopback, so both ends need keys"):
        find_membership(fleet_file, barn)
