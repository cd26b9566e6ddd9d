"""Fleets that can really serve, for the tests of devices."""

from __future__ import annotations

import pytest
from edge.fleets import settled


@pytest.fixture
def fleet(tiny_fleet, tmp_path):
    """The tiny fleet on free ports."""
    return settled(tiny_fleet, tmp_path / "fleet")


@pytest.fixture
def keyed(tiny_fleet, tmp_path):
    """The same with keys."""
    return settled(tiny_fleet, tmp_path / "fleet", keyed=True)
