"""Copies of the tiny fleet on free ports, for tests that serve devices."""

from __future__ import annotations

import pytest
from edge.fleets import copied_fleet


@pytest.fixture
def fleet(tiny_fleet, tmp_path):
    """The tiny fleet on free ports, without keys."""
    return copied_fleet(tiny_fleet, tmp_path / "fleet")


@pytest.fixture
def keyed(tiny_fleet, tmp_path):
    """The tiny fleet on free ports, with CURVE keys."""
    return copied_fleet(tiny_fleet, tmp_path / "fleet", keyed=True)
