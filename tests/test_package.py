"""The content and the metadata of the wheel."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nmoe_edge", "nmoe_export", "nmoe_train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel, name):
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".md", ".html"} or path.name == "py.typed"
    }
    assert shipped == ours


def test_the_wheel_installs_three_commands(wheel):
    lines = [line for line in metadata(wheel, "entry_points.txt").splitlines() if "=" in line]
    assert lines == [f"nmoe-{p} = nmoe_{p}.cli:main" for p in ("edge", "export", "train")]


def test_the_base_dependencies_do_not_depend_on_the_accelerator(wheel):
    stated = email.message_from_string(metadata(wheel, "METADATA"))
    base = [line for line in stated.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in base) == ["click", "numpy", "pyzmq", "tomli"]
    assert [line for line in base if "tomli" in line] == ['tomli>=2; python_version < "3.11"']
    assert {"edge", "edge-gpu", "train", "export", "dev", "all"} <= set(stated.get_all("Provides-Extra"))
    assert stated["Requires-Python"] == ">=3.10"


def test_the_wheel_states_its_licence(wheel):
    stated = email.message_from_string(metadata(wheel, "METADATA"))
    assert stated["License-Expression"] == "Apache-2.0"
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
