"""Replays bundles on the onnxruntime versions that boards have: `make test-runtimes`, or python tests/rigs/runtimes.py

Exports fleets of each precision, and runs their self-tests once per onnxruntime version, in an environment with only
what a device needs. A version without a wheel for this Python is reported and left out.
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

from nmoe_export import assignment  # noqa: E402
from nmoe_export.export import Options, export_fleet  # noqa: E402
from nmoe_export.source import of_modules  # noqa: E402
from nmoe_train.nets import NetSpec, build  # noqa: E402

ENVIRONMENTS = ROOT / ".venv-runtimes"
VERSIONS = ("1.15.1", "1.16.3", "1.17.3", "1.20.1", "newest")


def fleets(folder):
    """Export a narrow ResNet18, which has every operator of a full one, and attention, in several precisions."""
    torch.manual_seed(0)
    extractor = build(NetSpec("resnet18", {"channels": 3, "size": 32, "dim": 32, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (80, 3, 32, 32)).astype(np.uint8)
    source = of_modules(extractor, nn.Linear(32, 2), [nn.Linear(32, 4) for _ in range(2)], images)
    # Pretend that integer graphs are faster on this machine, so that every component is exported in int8.
    assignment.latencies = lambda *_: {"float": 2.0, "written": 1.0}
    export_fleet(source, folder / "fp32")
    export_fleet(source, folder / "fp16", Options("fp16", max_drop=100.0))
    export_fleet(source, folder / "int8", Options("int8", max_drop=100.0))
    rows = np.random.default_rng(0).normal(size=(80, 4, 6)).astype(np.float32)
    source = of_modules(Attentive(), nn.Linear(8, 2), [nn.Linear(8, 4) for _ in range(2)], rows)
    export_fleet(source, folder / "attention-fp16", Options("fp16", max_drop=100.0))
    export_fleet(source, folder / "attention-int8", Options("int8", max_drop=100.0))
    return [str(path) for path in sorted(folder.glob("*/device-*"))]


def environment(version):
    """The Python of an environment with this onnxruntime, created if it is missing; None if there is no wheel."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        wanted = ["onnxruntime"] if version == "newest" else [f"onnxruntime=={version}", "numpy<2"]
        packages = [*wanted, "pyzmq", "click", "tomli; python_version < '3.11'"]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"onnxruntime {version}: left out: {done.stderr.strip().splitlines()[-1]}")
            return None
        (folder / "ready").touch()
    return python


def main(versions):
    """Replay every bundle on every version; the exit status is the number of versions that failed."""
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
            failed += done.returncode != 0
            outcome = done.stderr.strip() if done.returncode else f"{len(bundles)} bundles passed"
            print(f"onnxruntime {version}: {outcome}", flush=True)
    if not tried:
        sys.exit("no version could be installed")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
