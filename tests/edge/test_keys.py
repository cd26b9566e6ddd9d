"""Key files, and the keys for a connection."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import zmq

from nmoe_edge.bundle.fleet import read_fleet, write_fleet
from nmoe_edge.errors import FleetError, KeyFileError
from nmoe_edge.keys import (
    KeyPair,
    address_of,
    key_path,
    keys_folder,
    keys_to,
    make_pair,
    read_key,
    with_keys,
    write_key,
)


@pytest.fixture
def pair():
    return make_pair()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "attic.key"


def refused(path):
    with pytest.raises(KeyFileError) as error:
        read_key(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def private(path, data=b""):
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_a_pair_is_read_back_unchanged(path, pair):
    write_key(path, pair)
    assert read_key(path) == pair


def test_two_new_pairs_differ():
    assert make_pair().secret != make_pair().secret


def test_the_public_key_is_computed_from_the_secret(path, pair):
    private(path, pair.secret.encode())
    assert read_key(path).public == zmq.curve_public(pair.secret.encode()).decode() == pair.public


def test_a_key_file_is_readable_by_its_owner_only_whatever_the_umask(path, pair):
    before = os.umask(0)
    try:
        write_key(path, pair)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_keys_folder_is_accessible_to_its_owner_only(tmp_path, pair):
    write_key(tmp_path / "keys" / "attic.key", pair)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) & 0o077 == 0


def test_a_key_file_contains_the_secret_key_only(path, pair):
    write_key(path, pair)
    assert path.read_text() == pair.secret + "\n"


def test_repr_hides_the_secret(pair):
    assert pair.secret not in repr(pair)
    assert pair.secret not in f"{pair} {[pair]}"
    assert pair.public in repr(pair)


def test_an_existing_key_file_is_never_overwritten(path, pair):
    write_key(path, pair)
    with pytest.raises(KeyFileError, match="File exists"):
        write_key(path, make_pair())
    assert read_key(path) == pair


def test_a_key_is_not_written_through_a_link(tmp_path, path, pair):
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError):
        write_key(path, pair)
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_cannot_be_written_is_a_one_line_error(tmp_path, pair):
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="cannot be written") as error:
        write_key(tmp_path / "file" / "attic.key", pair)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_no_incomplete_key_file(path, pair, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        write_key(path, pair)
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666])
def test_a_key_with_any_right_for_others_is_refused(path, pair, mode):
    write_key(path, pair)
    path.chmod(mode)
    assert "chmod 600" in refused(path)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_accessible_to_its_owner_only_is_read(path, pair, mode):
    write_key(path, pair)
    path.chmod(mode)
    assert read_key(path) == pair


@pytest.mark.parametrize(
    "data",
    [b"", b"short", b"a" * 39, b"a" * 41, b"a" * 40 + b"\n\n", b"a" * 39 + b'"', b"a" * 40 + b"\0" * 99, b"\xff" * 40],
)
def test_an_invalid_key_is_refused_and_not_shown(path, data):
    text = refused(private(path, data))
    assert "40 characters of Z85" in text
    assert "aaaa" not in text


def test_forty_characters_that_are_not_32_bytes_are_refused(path):
    assert "40 characters of Z85" in refused(private(path, b"#" * 40))  # five characters over 2**32


def test_a_missing_key_says_how_to_make_one(path):
    assert "nmoe-edge keygen" in refused(path)


def test_a_link_to_nothing_is_refused(tmp_path, path):
    path.symlink_to(tmp_path / "nothing")
    refused(path)


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path, 0o600), lambda path: path.mkdir(mode=0o700)])
def test_a_fifo_or_a_folder_is_refused_without_waiting(path, make):
    make(path)
    refused(path)


def test_the_keys_folder_is_next_to_the_fleet_folder(tmp_path):
    assert keys_folder(tmp_path / "fleet" / "fleet.toml") == tmp_path / "fleet-keys"


def test_the_keys_folder_of_the_current_folder_is_next_to_it(tmp_path, monkeypatch):
    (tmp_path / "fleet").mkdir()
    monkeypatch.chdir(tmp_path / "fleet")
    assert keys_folder(Path("fleet.toml")) == tmp_path / "fleet-keys"


def test_a_key_file_in_the_folder_of_fleet_toml_comes_first(tmp_path):
    (tmp_path / "fleet").mkdir()
    fleet_file = tmp_path / "fleet" / "fleet.toml"
    in_fleet_folder = tmp_path / "fleet" / "attic.key"
    assert key_path(fleet_file, "attic") == tmp_path / "fleet-keys" / "attic.key"
    in_fleet_folder.symlink_to("nothing")  # an existing path counts, even if it cannot be read
    assert key_path(fleet_file, "attic") == in_fleet_folder


@pytest.fixture
def keyed_file(tiny_fleet, tmp_path):
    (tmp_path / "fleet").mkdir()
    path = tmp_path / "fleet" / "fleet.toml"
    write_fleet(path, with_keys(read_fleet(tiny_fleet / "fleet.toml"), ["attic", "barn"], None, path))
    return path


def test_keys_to_uses_the_key_of_the_asker_then_of_the_target_then_of_any_device_of_the_fleet(keyed_file, tmp_path):
    fleet = read_fleet(keyed_file)
    attic = fleet.named("attic")
    barn = fleet.named("barn")
    secrets = tmp_path / "fleet-keys"

    def key_to_ask_attic(asker=None):
        pair, server = keys_to("attic", keyed_file.parent, None, asker)
        assert server == attic.public_key
        return pair.public

    assert key_to_ask_attic("barn") == barn.public_key
    assert key_to_ask_attic() == attic.public_key
    (secrets / "attic.key").unlink()
    assert key_to_ask_attic() == barn.public_key
    # The name of the file does not matter.
    (secrets / "barn.key").rename(keyed_file.parent / "mine.key")
    assert key_to_ask_attic("cellar") == barn.public_key
    # If no key fits, the error is about the one that cannot be read.
    (keyed_file.parent / "mine.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        key_to_ask_attic()
    (keyed_file.parent / "mine.key").unlink()
    # A key that fleet.toml does not list is skipped.
    write_key(secrets / "attic.key", make_pair())
    with pytest.raises(KeyFileError, match="give the key file of a device with --key"):
        key_to_ask_attic()
    with pytest.raises(FleetError, match=r"attic\.key: not the key of a device in .*fleet\.toml"):
        keys_to("attic", keyed_file, secrets / "attic.key")
    # cellar has no public key in fleet.toml.
    assert keys_to("cellar", keyed_file, None) == (None, None)
    assert address_of("barn", keyed_file) == address_of(barn.address, keyed_file.parent) == barn.address


def test_with_keys_makes_missing_pairs_and_keeps_existing_ones(tiny_fleet, tmp_path):
    fleet = read_fleet(tiny_fleet / "fleet.toml")
    first = with_keys(fleet, ["attic"], tmp_path)
    both = with_keys(fleet, ["attic", "barn"], tmp_path)
    assert both.named("attic") == first.named("attic")
    for name in ("attic", "barn"):
        assert read_key(tmp_path / f"{name}.key").public == both.named(name).public_key
    assert both.named("cellar") == fleet.named("cellar")


def test_with_keys_refuses_a_key_that_others_may_read(tiny_fleet, tmp_path):
    write_key(tmp_path / "attic.key", KeyPair("", make_pair().secret))
    (tmp_path / "attic.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        with_keys(read_fleet(tiny_fleet / "fleet.toml"), ["attic"], tmp_path)
