"""Checks that bundles load and pass their self-test on the onnxruntime versions of boards: `make test-runtimes`.

Exports a fleet in each precision, then runs `nmoe-edge selftest` in a separate environment for each onnxruntime
version. An environment has what a device needs and nothing else. A version without a wheel for this Python is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]

from export.foreign import Attentive  # noqa: E402

from nmoe_export import speed  # noqa: E402
from nmoe_export.export import Options, export_fleet  # noqa: E402
from nmoe_export.source import of_modules  # noqa: E402
from nmoe_train.nets import NetSpec, build  # noqa: E402

ENVIRONMENTS = ROOT / ".venv-runtimes"
VERSIONS = ("1.15.1", "1.16.3", "1.17.3", "1.20.1", "newest")


def fleets(folder):
    """Export a narrow ResNet18, which has every operator of a real one, and attention; the paths of all bundles."""
    torch.manual_seed(0)
    extractor = build(NetSpec("resnet18", {"channels": 3, "size": 32, "dim": 32, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (80, 3, 32, 32)).astype(np.uint8)
    source = of_modules(extractor, nn.Linear(32, 2), [nn.Linear(32, 4) for _ in range(2)], images)
    # Every graph becomes int8, however fast it is on this machine.
    speed.latencies = lambda *_: {"float": 2.0, "written": 1.0}
    export_fleet(source, folder / "fp32")
    export_fleet(source, folder / "fp16", Options("fp16", max_drop=100.0))
    export_fleet(source, folder / "int8", Options("int8", max_drop=100.0))
    rows = np.random.default_rng(0).normal(size=(80, 4, 6)).astype(np.float32)
    source = of_modules(Attentive(), nn.Linear(8, 2), [nn.Linear(8, 4) for _ in range(2)], rows)
    export_fleet(source, folder / "attention-fp16", Options("fp16", max_drop=100.0))
    export_fleet(source, folder / "attention-int8", Options("int8", max_drop=100.0))
    return [str(path) for path in sorted(folder.glob("*/device-*"))]


def environment(version):
    """The Python of an environment with this onnxruntime, created when it is missing; None without a wheel."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        wanted = ["onnxruntime"] if version == "newest" else [f"onnxruntime=={version}", "numpy<2"]
        packages = [*wanted, "pyzmq", "click", "tomli; python_version < '3.11'"]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"onnxruntime {version}: skipped: {done.stderr.strip().splitlines()[-1]}")
            return None
        (folder / "ready").touch()
    return python


def main(versions):
    """Run the self-test of every bundle on every version. The exit status is the number of versions that fail."""
    failed = 0
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        bundles = fleets(Path(folder))
        for version in versions or VERSIONS:
            python = environment(version)
            if python is None:
                continue
            command = [python, "-m", "nmoe_edge", "selftest", *bundles]
            done = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
            )
            tried += 1
            failed += bool(done.returncode)
            result = done.stderr.strip() if done.returncode else f"{len(bundles)} bundles passed"
            print(f"onnxruntime {version}: {result}", flush=True)
    if not tried:
        sys.exit("no version could be installed")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
