from __future__ import annotations

import numpy as np
import pytest

from nmoe_train.meter import PROC, StageMeter, usage_of


def package(powercap, number, name, microjoules, largest=10**9):
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_seconds_and_energy_add_up_over_interruptions_and_the_peak_is_the_highest(tmp_path):
    earlier = {"extractor": {"seconds": 100.0, "peak_memory_bytes": 2.0**50, "energy_j": 5.0}, "gate": {"seconds": 7.0}}
    package(tmp_path, 0, "package-0", 1_000_000)
    meter = StageMeter(earlier, "extractor", powercap=tmp_path)
    package(tmp_path, 0, "package-0", 3_500_000)
    used = meter.usage()
    assert used["gate"] == {"seconds": 7.0}
    assert 100 < used["extractor"]["seconds"] < 200
    assert used["extractor"]["peak_memory_bytes"] == 2.0**50
    assert used["extractor"]["energy_j"] == pytest.approx(7.5)
    assert earlier["extractor"]["seconds"] == 100.0


@pytest.mark.skipif(not (PROC / "clear_refs").exists(), reason="only Linux can reset the peak")
def test_a_stage_has_its_own_peak_of_memory():
    block = np.ones(200_000_000, np.uint8)
    before = StageMeter({}, "a").usage()["a"]["peak_memory_bytes"]
    del block
    after = StageMeter({}, "b").usage()["b"]["peak_memory_bytes"]
    assert after < before - 150_000_000


def test_memory_is_known_where_proc_is_missing(tmp_path):
    used = StageMeter({}, "a", proc=tmp_path / "nowhere", powercap=tmp_path).usage()["a"]
    assert used["peak_memory_bytes"] > 10**7


def test_energy_adds_up_over_packages_and_counters_that_wrap_around(tmp_path):
    package(tmp_path, 0, "package-0", 9_000_000, largest=10_000_000)
    package(tmp_path, 1, "package-1", 0)
    package(tmp_path, 2, "psys", 0)
    meter = StageMeter({}, "a", powercap=tmp_path)
    package(tmp_path, 0, "package-0", 1_000_000, largest=10_000_000)
    package(tmp_path, 1, "package-1", 500_000)
    package(tmp_path, 2, "psys", 90_000_000)
    assert meter.usage()["a"]["energy_j"] == pytest.approx(2.5)
    assert meter.usage()["a"]["energy_j"] == pytest.approx(2.5)


def test_no_energy_is_reported_where_the_machine_has_no_counter_or_hides_it(tmp_path):
    assert "energy_j" not in StageMeter({}, "a", powercap=tmp_path).usage()["a"]
    package(tmp_path, 0, "package-0", 5)
    meter = StageMeter({}, "a", powercap=tmp_path)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert "energy_j" not in meter.usage()["a"]


def test_the_usage_of_a_run_of_version_0_2_is_its_seconds():
    assert usage_of({"seconds": {"gate": 2.0, "all": 2.0}}) == {"gate": {"seconds": 2.0}}
    assert usage_of({}) == {}
