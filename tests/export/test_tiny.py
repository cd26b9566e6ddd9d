"""The committed tiny fleet is what its script makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny.make import make_fleet

from nmoe_edge.bundle.fleet import read_fleet_folder


def test_the_committed_fleet_is_what_the_script_makes(tiny_fleet, tmp_path):
    make_fleet(tmp_path / "fleet")
    made, bundles = read_fleet_folder(tmp_path / "fleet")
    committed, theirs = read_fleet_folder(tiny_fleet)
    assert [replace(d, bundle="0" * 64) for d in made.device] == [replace(d, bundle="0" * 64) for d in committed.device]
    for name, bundle in bundles.items():
        other = theirs[name]
        # Another CPU may compute another last bit, which changes the digests of selftest.npz and the bundle.
        for field in ("inputs", "latents", "experts", "outputs", "latent_tolerance", "output_tolerance"):
            assert np.allclose(getattr(bundle.selftest, field), getattr(other.selftest, field), atol=1e-6), field
        computed = {"selftest.npz"}
        assert bundle.contents.keys() == other.contents.keys()
        for file in bundle.contents.keys() - computed:
            assert bundle.contents[file] == other.contents[file], file
        assert replace(bundle.manifest, files={}, digest="") == replace(other.manifest, files={}, digest="")
