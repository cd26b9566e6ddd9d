"""The tiny fleet that is committed is the one that its script makes."""

from __future__ import annotations

from tiny.make import make_fleet


def test_the_committed_fleet_is_what_the_script_makes(tiny_fleet, tmp_path):
    make_fleet(tmp_path / "fleet")
    made = {path.relative_to(tmp_path / "fleet") for path in (tmp_path / "fleet").rglob("*")}
    assert made == {path.relative_to(tiny_fleet) for path in tiny_fleet.rglob("*")}
    for path in made:
        if (tiny_fleet / path).is_file():
            assert (tmp_path / "fleet" / path).read_bytes() == (tiny_fleet / path).read_bytes(), path
