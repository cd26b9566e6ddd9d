"""fleet.toml and the folder of a fleet."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nmoe_edge.bundle.fleet import FLEET_FILE, Device, Fleet, parse_fleet, port_of, read_fleet, read_fleet_folder
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.bundle.manifest import RoutingSpec, trunk_digest
from nmoe_edge.errors import BundleError, FleetError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
OTHER_KEY = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
DIGEST = "0123456789abcdef" * 4
ATTIC = Device("attic", 0, "tcp://192.0.2.1:7101", DIGEST, KEY)


@pytest.fixture
def folder(tiny_fleet, tmp_path):
    """A copy of the tiny fleet that a test may damage."""
    return Path(shutil.copytree(tiny_fleet, tmp_path / "fleet"))


def test_a_fleet_is_read_back_unchanged():
    barn = Device("barn.local-2", 5, "tcp://[fe80::1%eth0]:7102", DIGEST)
    fleet = Fleet(1, (ATTIC, barn))
    assert parse_fleet(fleet.render()) == fleet
    assert fleet.named("attic") == ATTIC


def test_an_unknown_device_is_refused_with_the_names_of_the_fleet():
    with pytest.raises(FleetError, match="no device is named 'cellar'; the fleet has attic"):
        Fleet(1, (ATTIC,)).named("cellar")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "a/b"}, "not a device name"),
        ({"expert": -1}, "expert is -1"),
        ({"address": "192.0.2.1:7101"}, "not tcp://HOST:PORT"),
        ({"address": "tcp://*:7101"}, "not tcp://HOST:PORT"),
        ({"name": "fleet.toml"}, "reserved for the fleet file"),
        ({"address": "tcp://host:0"}, "a port in 1..65535"),
        ({"address": "tcp://host:65536"}, "a port in 1..65535"),
        ({"address": "tcp://host:07101"}, "a port in 1..65535"),
        ({"address": "tcp://...:7101"}, "not tcp://HOST:PORT"),
        ({"bundle": "abc"}, "bundle is not 64"),
        ({"public_key": "short"}, "public_key is not 40"),
        ({"public_key": KEY[:-1] + '"'}, "public_key is not 40"),
    ],
)
def test_an_invalid_device_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        replace(ATTIC, **change)


@pytest.mark.parametrize("same", ["name", "expert", "address", "public_key"])
def test_two_devices_with_the_same_identity_are_refused(same):
    other = Device("barn", 1, "tcp://192.0.2.1:7102", DIGEST, OTHER_KEY)
    with pytest.raises(ValueError, match=f"the same {same}"):
        Fleet(1, (ATTIC, replace(other, **{same: getattr(ATTIC, same)})))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing"),
        ("schema = 2\ndevice = []", "schema 2 is unknown"),
        ("schema = 1\ndevice = []", r"no \[\[device\]\]"),
        ("schema = 1\ndevices = []", r"unknown key 'devices' \(did you mean 'device'\?\)"),
        ("schema = 1\n[[device]]\nname = 'a'", r"'device\[0\]\.expert' is missing"),
        ("schema = ", "Invalid value"),
        ("schema = 1979-05-27\ndevice = []", "schema is date; expected"),
        ("\udcff", "."),
    ],
)
def test_an_invalid_fleet_file_is_refused_in_one_line_with_its_path(tmp_path, text, why):
    path = tmp_path / FLEET_FILE
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(FleetError, match=why) as refused:
        read_fleet(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_missing_fleet_file_is_refused(tmp_path):
    with pytest.raises(FleetError, match="No such file"):
        read_fleet(tmp_path / FLEET_FILE)


def test_a_fleet_file_over_the_size_limit_is_refused(tmp_path):
    (tmp_path / FLEET_FILE).write_text("#" * (1024 * 1024 + 1))
    with pytest.raises(FleetError, match="more than"):
        read_fleet(tmp_path / FLEET_FILE)


def test_a_fleet_folder_is_read_with_its_bundles(folder):
    fleet, bundles = read_fleet_folder(folder)
    assert [device.name for device in fleet.device] == list(bundles) == ["attic", "barn", "cellar"]


def test_a_bundle_other_than_the_one_in_fleet_toml_is_refused(folder):
    bundle = read_bundle(folder / "barn")
    write_bundle(folder / "barn", replace(bundle.manifest, target="pi"), bundle.contents)
    with pytest.raises(FleetError, match=r"barn: not the bundle that fleet\.toml names"):
        read_fleet_folder(folder)


def test_two_bundles_in_exchanged_folders_are_refused(folder):
    (folder / "attic").rename(folder / "x")
    (folder / "barn").rename(folder / "attic")
    (folder / "x").rename(folder / "barn")
    with pytest.raises(FleetError, match="attic: not the bundle"):
        read_fleet_folder(folder)


def test_a_bundle_of_another_device_is_refused_even_if_its_digest_matches(folder):
    fleet = read_fleet(folder / FLEET_FILE)
    swapped = (replace(fleet.device[0], name="barn"), replace(fleet.device[1], name="attic"), fleet.device[2])
    (folder / FLEET_FILE).write_text(Fleet(1, swapped).render())
    (folder / "attic").rename(folder / "x")
    (folder / "barn").rename(folder / "attic")
    (folder / "x").rename(folder / "barn")
    with pytest.raises(FleetError, match="barn: the bundle of attic, expert 0; fleet.toml expects barn, expert 0"):
        read_fleet_folder(folder)


def test_two_trunks_in_one_fleet_are_refused(folder):
    bundle = read_bundle(folder / "barn")
    source = "1" * 64
    foreign = replace(bundle.manifest, extractor_source=source, trunk=trunk_digest(source, 4, 3, 3))
    write_bundle(folder / "barn", foreign, bundle.contents)
    with pytest.raises(FleetError, match="2 different trunks"):
        read_fleet_folder(folder)


@pytest.mark.parametrize(
    ("change", "contents", "text"),
    [
        ({}, {"labels.txt": b"cat\ndog\ncow\n"}, "lists of labels"),
        ({"answers_carry_prior": True}, {}, "kinds of answers"),
        ({"routing": RoutingSpec(1, "probabilities")}, {}, "combinations"),
    ],
)
def test_devices_that_cannot_combine_their_answers_are_refused(folder, change, contents, text):
    bundle = read_bundle(folder / "barn")
    write_bundle(folder / "barn", replace(bundle.manifest, **change), {**bundle.contents, **contents})
    with pytest.raises(FleetError, match=f"2 different {text}"):
        read_fleet_folder(folder)


def test_a_board_needs_its_own_bundle_only(folder):
    shutil.rmtree(folder / "cellar")
    shutil.rmtree(folder / "attic")
    fleet, bundles = read_fleet_folder(folder)
    assert [device.name for device in fleet.device] == ["attic", "barn", "cellar"]
    assert list(bundles) == ["barn"]


def test_a_fleet_folder_without_any_bundle_is_refused(folder):
    for name in ("attic", "barn", "cellar"):
        shutil.rmtree(folder / name)
    with pytest.raises(FleetError, match=r"no bundle of a device in fleet\.toml is here"):
        read_fleet_folder(folder)


@pytest.mark.parametrize("kind", ["empty folder", "file", "dangling link"])
def test_a_path_with_the_name_of_a_device_must_be_its_bundle(folder, kind):
    shutil.rmtree(folder / "cellar")
    if kind == "empty folder":
        (folder / "cellar").mkdir()
    elif kind == "file":
        (folder / "cellar").touch()
    else:
        (folder / "cellar").symlink_to(folder / "nowhere")
    with pytest.raises(BundleError, match="cellar"):
        read_fleet_folder(folder)


@pytest.mark.parametrize("target", ["barn", "tcp://127.0.0.1:7102"])
def test_a_device_is_found_by_its_name_or_its_address(tiny_fleet, target):
    fleet = read_fleet(tiny_fleet / "fleet.toml")
    assert fleet.find(target).name == "barn"
    with pytest.raises(FleetError, match="the fleet has attic at tcp://127.0.0.1:7101, barn at"):
        fleet.find(target + "0")


@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("tcp://127.0.0.1:7640", 7640),
        ("tcp://[::1]:1", 1),
        ("tcp://*:65535", 65535),
        ("tcp://127.0.0.1:0", 0),
        ("tcp://127.0.0.1:*", 0),
        *((text, None) for text in ("7640", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://:7640", "tcp://a:-1")),
        *((text, None) for text in ("ipc://a:1", "tcp://a b:1", "tcp://a:１", "tcp://a:1\n", "tcp://a:b")),
    ],
)
def test_the_port_of_an_address_is_parsed_strictly(address, port):
    assert port_of(address) == port
