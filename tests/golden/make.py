"""Write golden samples of the formats that have a version 2: so far the bundle.

    python tests/golden/make.py

v1/ has a sample of every format in version 1; the script that wrote it is in the history. All samples must load
forever, so this script never overwrites one. A new version of a format gets a new folder; the fleet file and the wire
are still at version 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny.make import bundle

from nmoe_edge.bundle.folder import write_bundle
from nmoe_edge.bundle.manifest import sha256
from nmoe_edge.bundle.statistics import write_statistics
from nmoe_edge.protocol.familiar import Familiar

HERE = Path(__file__).parent / "v2"
FAMILIAR = Familiar(
    np.array([[4, 0], [0, 4], [1, 1], [0, 0]], np.float32),
    np.array([[1, 0], [0, 3], [-2, 0.5]], np.float32),
)


def write_golden_bundle(folder):
    """A bundle of the tiny fleet that adapts and tests whether latents are familiar."""
    manifest, contents = bundle(1)
    routing = replace(manifest.routing, combination="probabilities", local_first=0.9, adapt=True, familiar=2.5)
    write_bundle(folder, replace(manifest, routing=routing), {**contents, "familiar.npz": write_statistics(FAMILIAR)})


PARTS = {"bundle": write_golden_bundle}
"""Name of a sample -> what writes it."""


def write_golden():
    """Write the samples that do not exist yet, and the digests of all files."""
    missing = [name for name in PARTS if not (HERE / name).exists()]
    for name in missing:
        PARTS[name](HERE / name)
    files = [path for path in HERE.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(HERE)): sha256(path.read_bytes()) for path in files}
    HERE.with_suffix(".json").write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")
    print(f"wrote {', '.join(missing) or 'nothing: every sample exists'}")


if __name__ == "__main__":
    write_golden()
