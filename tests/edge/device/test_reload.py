"""Files that change while a device serves."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest
from edge.fleets import copied_fleet, nodes, pin_bundle, wait_until

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.bundle.folder import MANIFEST, read_bundle, write_bundle
from nmoe_edge.device import node
from nmoe_edge.keys import keys_folder, with_keys

pytestmark = pytest.mark.socket


def test_a_bundle_that_is_copied_file_by_file_is_served_once_it_is_complete(fleet, tiny_fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "_LOOK_S", 0.05)
    other = copied_fleet(tiny_fleet, tmp_path / "other")
    bundle = read_bundle(other / "attic")
    labels = b"one\ntwo\nthree\n"
    changed = write_bundle(
        other / "attic", replace(bundle.manifest, target="pi"), {**bundle.contents, "labels.txt": labels}
    )
    with nodes(fleet, "attic") as (attic,):
        time.sleep(0.2)
        shutil.copy(other / "attic" / MANIFEST, fleet / "attic" / MANIFEST)
        wait_until(lambda: attic.status()["counts"].get("reloads_refused"))
        assert attic.status()["bundle"] == bundle.manifest.digest
        pin_bundle(fleet, changed)
        shutil.copy(other / "attic" / "labels.txt", fleet / "attic" / "labels.txt")
        wait_until(lambda: attic.status()["bundle"] == changed.manifest.digest)
        assert attic.status()["labels"] == ["one", "two", "three"]


def test_keys_that_are_added_while_a_device_serves_need_a_restart(fleet):
    with nodes(fleet, "attic") as (attic,):
        path = fleet / FLEET_FILE
        described = with_keys(read_fleet(path), ["attic", "barn", "cellar"], keys_folder(path))
        remote = replace(described.device[1], address="tcp://192.0.2.7:7101")
        write_fleet(path, replace(described, device=(described.device[0], remote, described.device[2])))
        attic.reload()
        wait_until(lambda: attic.status()["counts"].get("reloads_refused"))
        assert {peer["address"].split(":")[1] for peer in attic.status()["peers"]} == {"//127.0.0.1"}
