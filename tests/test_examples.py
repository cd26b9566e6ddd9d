"""Every example runs, and says what its docstring promises."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from conftest import TESTS
from edge.fleets import Processes, bright, copied_fleet
from PIL import Image

EXAMPLES = TESTS.parent / "examples"


def finished(script, *arguments):
    """The finished process of an example."""
    command = [sys.executable, "-W", "error", EXAMPLES / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def run(script, *arguments):
    """The stdout of an example, which must succeed."""
    done = finished(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert "refuses" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("quickstart.py", ()),
        ("quickstart.py", ("one", "two")),
        ("quickstart.py", ("--quick",)),
        ("one_process_fleet.py", ()),
        ("bring_your_own_model.py", ("model.py",)),
    ],
)
def test_wrong_arguments_print_the_usage(script, wrong):
    for arguments, code in ((wrong, 2), (("--help",), 0)):
        done = finished(script, *arguments)
        assert (done.returncode, f"{script} " in done.stdout + done.stderr) == (code, True)
        assert "usage: " in (done.stderr if code else done.stdout)


@pytest.mark.socket
def test_the_quickstart_explains_an_address_in_use(tiny_fleet, tmp_path):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet")
    with Processes(folder, "attic"):
        done = finished("quickstart.py", folder)
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "serves the devices itself" in done.stderr


def test_one_process_fleet_answers_also_while_one_expert_is_silent(tiny_fleet):
    printed = run("one_process_fleet.py", tiny_fleet)
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if "answered" in line] == ["top", "middle", "bottom"] * 2
    assert printed.count("degraded, expert 1 is missing") == 1


@pytest.mark.socket
@pytest.mark.parametrize("keyed", [False, True], ids=["without keys", "with keys"])
def test_the_quickstart_answers_with_three_devices_and_with_two(tiny_fleet, tmp_path, keyed):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet", keyed=keyed)
    lines = run("quickstart.py", folder).splitlines()
    assert [line.split("by ")[1] for line in lines[1:4]] == [f"expert {number} (100%)" for number in range(3)]
    assert lines[4] == "the same without cellar:"
    assert sum("degraded" in line for line in lines) == 1


@pytest.mark.socket
def test_two_devices_with_your_own_model_are_better_than_either_alone():
    exported, *devices = run("bring_your_own_model.py").splitlines()
    assert exported == "exported: device-00, device-01"
    for line in devices:
        fleet, by_other, alone = map(float, re.findall(r"([0-9.]+)%", line))
        assert fleet > 85 > 65 > alone
        assert 30 < by_other < 70


@pytest.mark.socket
def test_a_camera_prints_what_it_saw_and_what_it_dropped(tiny_fleet, tmp_path):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet", keyed=True)
    (tmp_path / "pictures").mkdir()
    for third in range(3):
        Image.fromarray(bright(third)[0, 0]).save(tmp_path / "pictures" / f"{third}.png")
    with Processes(folder, "attic"):
        *seconds, total = run(
            "camera.py", folder, "--seconds", "2.5", "--fps", "40", "--pictures", tmp_path / "pictures"
        ).splitlines()
    assert len(seconds) == 2
    answered, dropped = map(int, re.fullmatch(r"100 frames: (\d+) answered, (\d+) dropped", total).groups())
    assert answered + dropped == 100
    assert answered > 0


@pytest.mark.socket
def test_a_camera_drops_the_frames_of_a_frozen_device_and_ends_with_ctrl_c(tiny_fleet, tmp_path):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet")
    command = [sys.executable, "-W", "error", EXAMPLES / "camera.py", folder, "--fps", "20"]
    with (
        Processes(folder, "attic") as fleet,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as camera,
    ):
        try:
            assert "saw" in camera.stdout.readline()
            fleet.signal("attic", signal.SIGSTOP)
            assert any("saw nothing" in line for line in camera.stdout)
            camera.send_signal(signal.SIGINT)
            rest, error = camera.communicate(timeout=30)
        finally:
            camera.kill()
    assert (camera.returncode, error) == (0, "")
    assert int(re.search(r"(\d+) dropped$", rest)[1]) > 5
