"""Exports that write the folders of some devices only."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from nmoe_edge.bundle.fleet import read_fleet, read_fleet_folder
from nmoe_export.cli import main
from nmoe_export.errors import SourceError
from nmoe_export.export import Options, export_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The golden run, exported for every device."""
    from conftest import TESTS

    folder = tmp_path_factory.mktemp("devices") / "fleet"
    export_run(TESTS / "golden" / "v1" / "run", folder)
    return folder


def folders(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def test_only_the_devices_that_are_asked_for_are_written_and_all_are_named(golden, whole, tmp_path):
    out = tmp_path / "fleet"
    done = export_run(golden / "run", out, Options(devices=(0, 2)))
    assert folders(out) == ["device-00", "device-02"]
    assert read_fleet(out / "fleet.toml") == read_fleet(whole / "fleet.toml") == done.fleet
    assert list(read_fleet_folder(out)[1]) == ["device-00", "device-02"]
    assert not export_run(golden / "run", out, Options(devices=(2,))).changed


def test_other_devices_of_the_same_export_are_kept_and_those_of_another_are_not(golden, tmp_path):
    out = tmp_path / "fleet"
    export_run(golden / "run", out, Options(devices=(0,)))
    before = (out / "device-00" / "expert.onnx").stat().st_ino
    assert export_run(golden / "run", out, Options(devices=(1,))).changed
    assert folders(out) == ["device-00", "device-01"]
    assert (out / "device-00" / "expert.onnx").stat().st_ino == before
    export_run(golden / "run", out, Options(devices=(2,), latent="int8"))
    assert folders(out) == ["device-02"]
    assert export_run(golden / "run", out, Options(latent="int8")).changed
    assert folders(out) == ["device-00", "device-01", "device-02"]


def test_a_device_of_another_export_that_lies_here_is_no_unchanged_fleet(golden, whole, tmp_path):
    out = tmp_path / "fleet"
    export_run(golden / "run", out, Options(devices=(0,), latent="int8"))
    shutil.copytree(whole / "device-01", out / "device-01")
    assert export_run(golden / "run", out, Options(devices=(0,), latent="int8")).changed
    assert folders(out) == ["device-00"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3-", "'3-' is no number and no range such as 3-5"),
        ("2-0", "'2-0' is no number"),
        ("", "'' is no number"),
        ("0,,1", "'' is no number"),
        ("0-9999999999", "'0-9999999999' is no number"),
        ("one", "'one' is no number"),
        ("0,7", "no device 7: there are 0 to 2"),
    ],
)
def test_a_list_of_devices_that_cannot_be_is_one_line(run_main, golden, tmp_path, text, why):
    shown = run_main(main, golden / "run", "--out", tmp_path / "fleet", "--devices", text)
    assert (shown.exit_code, shown.output, shown.error.count("\n")) == (1, "", 1)
    assert why in shown.error
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_list_of_numbers_and_ranges(run_main, golden, tmp_path):
    shown = run_main(main, golden / "run", "--out", tmp_path / "fleet", "--devices", "1-2,1")
    assert shown.exit_code == 0, shown.error
    assert folders(tmp_path / "fleet") == ["device-01", "device-02"]
    assert "fleet: 2 bundles" in shown.output


def test_no_device_at_all_is_refused(golden, tmp_path):
    with pytest.raises(SourceError, match="no device is named"):
        export_run(golden / "run", tmp_path / "fleet", replace(Options(), devices=()))
