"""The public API: what API.md promises can be imported, is documented, and runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from conftest import TESTS

API_MD = (TESTS.parent / "API.md").read_text()
PACKAGES = ("nmoe_edge", "nmoe_export", "nmoe_train")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_is_documented_in_the_code_and_in_api_md(package, name):
    public = getattr(importlib.import_module(package), name)
    assert public.__doc__
    assert re.search(rf"\b{name}\b", API_MD)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_does_not_exist_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = importlib.import_module(package).Nothing


def test_the_blocks_of_api_md_run_in_their_order(tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", API_MD, re.S))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "device-04" in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"numpy", "zmq", "onnxruntime", "torch", "onnx", "click"}
