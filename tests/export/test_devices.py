"""Exports that write the folders of some devices only."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from nmoe_edge.bundle.fleet import read_fleet, read_fleet_folder
from nmoe_export.cli import main
from nmoe_export.errors import SourceError
from nmoe_export.export import Options, export_fleet


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The golden run, exported for every device."""
    from conftest import TESTS

    folder = tmp_path_factory.mktemp("devices") / "fleet"
    export_fleet(TESTS / "golden" / "v1" / "run", folder)
    return folder


def folders(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def test_only_the_requested_devices_get_a_folder_and_fleet_toml_names_all(golden, whole, tmp_path):
    out = tmp_path / "fleet"
    done = export_fleet(golden / "run", out, Options(devices=(0, 2)))
    assert folders(out) == ["device-00", "device-02"]
    assert read_fleet(out / "fleet.toml") == read_fleet(whole / "fleet.toml") == done.fleet
    assert list(read_fleet_folder(out)[1]) == ["device-00", "device-02"]
    assert not export_fleet(golden / "run", out, Options(devices=(2,))).changed


def test_folders_of_the_same_export_are_kept_and_those_of_another_are_removed(golden, tmp_path):
    out = tmp_path / "fleet"
    export_fleet(golden / "run", out, Options(devices=(0,)))
    before = (out / "device-00" / "expert.onnx").stat().st_ino
    assert export_fleet(golden / "run", out, Options(devices=(1,))).changed
    assert folders(out) == ["device-00", "device-01"]
    assert (out / "device-00" / "expert.onnx").stat().st_ino == before
    export_fleet(golden / "run", out, Options(devices=(2,), latent="int8"))
    assert folders(out) == ["device-02"]
    assert export_fleet(golden / "run", out, Options(latent="int8")).changed
    assert folders(out) == ["device-00", "device-01", "device-02"]


def test_a_folder_from_another_export_makes_the_fleet_out_of_date(golden, whole, tmp_path):
    out = tmp_path / "fleet"
    export_fleet(golden / "run", out, Options(devices=(0,), latent="int8"))
    shutil.copytree(whole / "device-01", out / "device-01")
    assert export_fleet(golden / "run", out, Options(devices=(0,), latent="int8")).changed
    assert folders(out) == ["device-00"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3-", "'3-' is not a number or a range such as 3-5"),
        ("2-0", "'2-0' is not a number"),
        ("", "'' is not a number"),
        ("0,,1", "'' is not a number"),
        ("0-9999999999", "'0-9999999999' is not a number"),
        ("one", "'one' is not a number"),
        ("0,7", "there is no device 7; this fleet has devices 0 to 2"),
    ],
)
def test_an_invalid_list_of_devices_is_refused_in_one_line(run_main, golden, tmp_path, text, why):
    shown = run_main(main, golden / "run", "--out", tmp_path / "fleet", "--devices", text)
    assert (shown.exit_code, shown.output, shown.error.count("\n")) == (1, "", 1)
    assert why in shown.error
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_list_of_numbers_and_ranges(run_main, golden, tmp_path):
    shown = run_main(main, golden / "run", "--out", tmp_path / "fleet", "--devices", "1-2,1")
    assert shown.exit_code == 0, shown.error
    assert folders(tmp_path / "fleet") == ["device-01", "device-02"]
    assert "fleet: 2 bundles" in shown.output


def test_an_empty_list_of_devices_is_refused(golden, tmp_path):
    with pytest.raises(SourceError, match="devices is empty; name at least one of 0 to 2"):
        export_fleet(golden / "run", tmp_path / "fleet", replace(Options(), devices=()))
