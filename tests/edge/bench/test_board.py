"""Boards described by made-up files of /proc and /sys."""

from __future__ import annotations

import pytest

from nmoe_edge.bench.board import Meter, read_machine, read_memory, read_moment

PI = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "".join(
        f"processor\t: {i}\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n" for i in range(4)
    ),
    "proc/meminfo": "MemTotal:        8245000 kB\nMemFree: 1 kB\n",
    "proc/loadavg": "0.25 0.10 0.05 1/200 999\n",
    "proc/sys/kernel/osrelease": "6.6.20+rpt-rpi-2712\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
    "sys/class/thermal/thermal_zone0/temp": "61250\n",
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "50005\n",
}
INTEL = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\n\nprocessor\t: 1\n",
    "sys/devices/virtual/dmi/id/product_name": "NUC\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "1\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Charging\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "9000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1\n",
    "sys/class/powercap/intel-rapl:1/name": "psys\n",  # includes the package
    "sys/class/powercap/intel-rapl:1/energy_uj": "1\n",
}
SENSORS = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
    f"{SENSORS}/in1_label": "VDD_IN\n",
    f"{SENSORS}/in1_input": "5000\n",
    f"{SENSORS}/curr1_input": "1000\n",
    f"{SENSORS}/in2_label": "VDD_CPU_GPU_CV\n",
    f"{SENSORS}/in2_input": "5000\n",
    f"{SENSORS}/curr2_input": "9000\n",
}


@pytest.fixture
def board(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_raspberry_pi_reports_its_model_and_condition(board):
    root = board(PI)
    machine, moment = read_machine(root), read_moment(root)
    assert (machine.board, machine.cpu) == ("Raspberry Pi 5 Model B Rev 1.0", "Arm Cortex-A76")
    assert (machine.cores, machine.memory_bytes, machine.kernel) == (4, 8245000 * 1024, "6.6.20+rpt-rpi-2712")
    assert (moment.load, moment.governor, moment.mhz, moment.most_mhz) == (0.25, "ondemand", 2400, 2400)
    assert moment.temperature_c == 61.25
    assert moment.throttled == "under-voltage, throttled, under-voltage since boot, throttled since boot"
    assert moment.power is None


def test_a_raspberry_pi_that_was_never_throttled_reports_no(board):
    root = board(PI | {"sys/devices/platform/soc/soc:firmware/get_throttled": "0\n"})
    (root / "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled").unlink()
    assert read_moment(root).throttled == "no"


def test_a_laptop_reports_how_often_it_was_throttled_and_its_power_source(board):
    root = board(INTEL)
    assert read_machine(root).board == "NUC"
    assert read_machine(root).cpu == "Some CPU @ 2.00GHz"
    assert read_moment(root).throttled == "7 times since boot"
    assert read_moment(root).power == "mains"
    board({"sys/class/power_supply/AC/online": "0\n", "sys/class/power_supply/BAT0/status": "Discharging\n"})
    assert read_moment(root).power == "battery"


def test_an_unknown_arm_core_is_named_by_its_numbers(board):
    root = board({"proc/cpuinfo": "processor : 0\nCPU implementer : 0x61\nCPU part : 0x022\n"})
    assert read_machine(root).cpu == "implementer 0x61, part 0x022"


def test_what_a_board_does_not_report_is_none(tmp_path):
    for read in (read_machine, read_moment, read_memory):
        found = read(tmp_path)
        assert all(getattr(found, name) is None for name in found.__slots__), found
    meter = Meter(0, tmp_path)
    meter.tick(1_000_000_000)
    assert meter.mean_w is None


def test_files_that_cannot_be_parsed_are_none_too(board):
    root = board(dict.fromkeys({**PI, **INTEL, **JETSON}, "\x00nonsense: kB\n"))
    assert read_machine(root).memory_bytes is None
    moment = read_moment(root)
    assert (moment.load, moment.mhz, moment.temperature_c, moment.throttled, moment.power) == (None,) * 5
    assert Meter(0, root).mean_w is None


def test_energy_counters_may_wrap_around_and_only_packages_count(board):
    root = board(INTEL)
    meter = Meter(0, root)
    board(
        {"sys/class/powercap/intel-rapl:0/energy_uj": "9500000\n", "sys/class/powercap/intel-rapl:0:0/energy_uj": "9\n"}
    )
    meter.tick(1_000_000_000)
    board({"sys/class/powercap/intel-rapl:0/energy_uj": "500000\n"})  # wrapped around at ten million
    meter.tick(2_000_000_000)
    assert meter.mean_w == pytest.approx(0.75)


def test_energy_counters_that_only_root_may_read_give_no_power(board):
    root = board(INTEL)
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    meter = Meter(0, root)
    meter.tick(1_000_000_000)
    assert meter.mean_w is None


def test_the_power_of_a_jetson_is_that_of_its_whole_input(board):
    root = board(JETSON)
    meter = Meter(0, root)
    board({f"{SENSORS}/curr1_input": "3000\n"})
    meter.tick(2_000_000_000)
    assert meter.mean_w == pytest.approx((5 + 15) / 2)


def test_the_memory_of_this_process_is_read():
    memory = read_memory()
    assert memory.rss > 1_000_000
