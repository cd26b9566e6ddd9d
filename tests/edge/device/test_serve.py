"""`nmoe-edge serve` and the commands that talk to it, as processes with real signals."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from edge.fleets import Load, Processes, bright, copied_fleet, free_ports, pin_bundle, serve_command, states, wait_until

from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.cli import main
from nmoe_edge.keys import make_pair, write_key

pytestmark = pytest.mark.socket


@pytest.fixture
def nmoe_edge(run_main):
    return lambda *arguments: run_main(main, *arguments)


def test_a_fleet_of_processes_with_keys_answers_and_shuts_down(keyed, nmoe_edge, tmp_path):
    with Processes(keyed) as fleet:
        fleet.wait_for_peers("attic")
        np.savez(tmp_path / "inputs.npz", inputs=bright(0, 1, 2))
        address = read_fleet(keyed / FLEET_FILE).named("attic").address
        access = ("--at", address, "--fleet", keyed / FLEET_FILE)
        shown = nmoe_edge("infer", tmp_path / "inputs.npz", *access, "--json")
        rows = [json.loads(line) for line in shown.output.splitlines()]
        assert [row["label"] for row in rows] == ["top", "middle", "bottom"]
        assert [list(row["experts"]) for row in rows] == [["0"], ["1"], ["2"]]
        text = nmoe_edge("infer", tmp_path / "inputs.npz", *access).output
        assert "inputs.npz[1]  middle" in text
        assert "by expert 1 (100%)" in text
        status = nmoe_edge("status", *access).output
        assert "attic, expert 0 of 3" in status
        assert "cellar" in status
        assert json.loads(nmoe_edge("status", *access, "--json").output)["counts"]["rows"] == 6
        fleet.signal("barn", signal.SIGTERM)
        assert fleet.running["barn"].wait(10) == 0
        with fleet.client("attic") as client:
            wait_until(lambda: states(client.status())["barn"] != "alive")
    assert "barn leaving" in (fleet.logs / "barn").read_text()


def test_a_frozen_peer_becomes_silent_and_is_alive_again_once_it_continues(fleet):
    with Processes(fleet) as running:
        running.wait_for_peers("attic")
        with Load(running, "attic") as load, running.client("attic") as client:
            wait_until(lambda: len(load.done) > 100)
            running.signal("cellar", signal.SIGSTOP)
            frozen_at = time.monotonic()
            wait_until(lambda: states(client.status())["cellar"] == "silent")
            assert time.monotonic() - frozen_at < 9  # a wide limit; tests/rigs/soak.py measures the time
            before = len(load.done)
            wait_until(lambda: len(load.done) > before + 100)
            running.signal("cellar", signal.SIGCONT)
            wait_until(lambda: states(client.status())["cellar"] == "alive")
        assert load.sound, load.summary()


def test_a_device_that_gets_sigcont_and_sigterm_at_once_ends(fleet):
    for _ in range(3):
        with Processes(fleet, "attic") as running, Load(running, "attic", deadline_s=0.1) as load:
            wait_until(lambda load=load: len(load.done) > 100)
            running.signal("attic", signal.SIGSTOP)
            refused = len(load.refused)
            wait_until(lambda load=load, refused=refused: len(load.refused) > refused + 4)
            running.signal("attic", signal.SIGCONT)
            running.signal("attic", signal.SIGTERM)
            assert running.running["attic"].wait(12) == 0


def test_peers_that_are_killed_and_restarted_cost_no_row(keyed):
    with Processes(keyed) as running:
        running.wait_for_peers("attic")
        with Load(running, "attic") as load, running.client("attic") as client:
            for name in ("barn", "cellar", "barn"):
                before = len(load.done)
                wait_until(lambda before=before: len(load.done) > before + 50)
                running.kill(name)
                wait_until(lambda name=name: states(client.status())[name] != "alive")
                running.start(name)
                running.ready(name)
                wait_until(lambda name=name: states(client.status())[name] == "alive")
        assert load.sound, load.summary()


def test_sighup_reloads_the_bundle_and_no_request_fails(fleet):
    with Processes(fleet) as running:
        running.wait_for_peers("attic")
        with Load(running, "attic") as load, running.client("attic") as client:
            bundle = read_bundle(fleet / "attic")
            changed = write_bundle(fleet / "attic", replace(bundle.manifest, target="pi"), bundle.contents)
            pin_bundle(fleet, changed)
            running.signal("attic", signal.SIGHUP)
            wait_until(lambda: client.status()["bundle"] == changed.manifest.digest)
            before = len(load.done)
            wait_until(lambda: len(load.done) > before + 50)
            # A changed manifest is noticed without a signal too.
            again = write_bundle(fleet / "attic", bundle.manifest, bundle.contents)
            pin_bundle(fleet, again)
            wait_until(lambda: client.status()["bundle"] == again.manifest.digest)
        assert load.sound, load.summary()


def multicast_works():
    """Whether this machine delivers multicast datagrams on loopback; not all do."""
    group = socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.bind(("", 0))
            one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            one.settimeout(1)
            one.sendto(b"?", ("224.0.0.251", one.getsockname()[1]))
            return one.recv(1) == b"?"
        except OSError:
            return False


def test_a_peer_that_is_not_at_its_address_in_fleet_toml_is_discovered(fleet):
    pytest.importorskip("zeroconf")
    if not multicast_works():
        pytest.skip("no multicast on this machine's loopback")
    (port,) = free_ports(1)
    with Processes(fleet, "attic", options=("--discover",)) as running:
        running.options = ("--discover", "--listen", f"tcp://127.0.0.1:{port}")
        running.start("barn")
        running.ready("barn")
        running.wait_for_peers("attic")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--top-k", "4"), "top-k 4 is not in 1..3"),
        (("--provider", "tensorrt"), "pip install 'nmoe[edge-gpu]'"),
        (("--fleet", "nowhere.toml"), "nowhere.toml: No such file"),
        (("--listen", "tcp://0.0.0.0:1"), "nmoe-edge keygen makes keys"),
        (("--listen", "7640"), "expected tcp://HOST:PORT"),
        (("--listen", "tcp://127.0.0.1:99999"), "with a port in 1..65535"),
        (("--listen", "tcp://127.0.0.1:-1"), "with a port in 1..65535"),
        (("--key", "missing.key"), "missing.key"),
    ],
)
def test_what_cannot_be_served_prints_one_line_and_exits_with_1(fleet, options, text):
    done = subprocess.run(serve_command(fleet, "attic", *options), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_serving_a_whole_fleets_folder_is_refused(fleet, nmoe_edge):
    refused = nmoe_edge("serve", fleet)
    assert (refused.exit_code, refused.error.count("\n")) == (1, 1)
    assert "is a fleet folder; serve one of its devices" in refused.error


def test_a_json_log_has_one_object_per_line(fleet):
    with Processes(fleet, "attic", options=("--log-json",)) as running:
        pass
    lines = [json.loads(line) for line in (running.logs / "attic").read_text().splitlines()]
    assert {"time", "device", "event"} <= lines[0].keys()
    assert lines[-1]["event"] == "leaving"


def test_keygen_keeps_existing_pairs_and_no_one_else_can_read_its_files(tiny_fleet, tmp_path, nmoe_edge):
    folder = copied_fleet(tiny_fleet, tmp_path / "fleet")
    shown = nmoe_edge("keygen", folder)
    assert shown.exit_code == 0, shown.error
    keys = read_fleet(folder / FLEET_FILE)
    assert all(device.public_key for device in keys.device)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "fleet-keys").iterdir()} == {0o600}
    assert nmoe_edge("keygen", folder, "--device", "attic").exit_code == 0
    assert read_fleet(folder / FLEET_FILE) == keys
    assert "no device is named 'shed'" in nmoe_edge("keygen", folder, "--device", "shed").error
    secrets = [path.read_text().strip() for path in (tmp_path / "fleet-keys").iterdir()]
    assert not any(secret in shown.output for secret in secrets)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("infer", "x.npy", "missing.npy", "--at", "tcp://127.0.0.1:1"), "missing.npy: no such file"),
        (
            ("infer", "x.npy", "--at", "tcp://127.0.0.1:1"),
            "needs a key pair (nmoe-edge: --fleet)",
        ),
        (("infer", "x.npy", "--at", "nonsense"), "expected tcp://HOST:PORT"),
        (("status", "--at", "tcp://127.0.0.1:99999"), "expected tcp://HOST:PORT with a port in 1..65535"),
        (("status", "--at", "shed", "--fleet", "."), "the fleet has attic at tcp://127.0.0.1:7101, barn at"),
        (("status", "--at", "tcp://127.0.0.1:1", "--key", "some.key"), "--key needs --fleet"),
        (("keygen", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_asked_prints_one_line(nmoe_edge, tiny_fleet, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_fleet / FLEET_FILE, tmp_path)
    np.save("x.npy", bright(0))
    shown = nmoe_edge(*arguments)
    assert (shown.exit_code, shown.output, shown.error.count("\n")) == (1, "", 1)
    assert text in shown.error


@pytest.mark.parametrize("options", [(), ("--at", "tcp://127.0.0.1:1", "--bundle", "attic")])
def test_infer_needs_either_a_device_or_a_bundle(nmoe_edge, options):
    shown = nmoe_edge("infer", "x.npy", *options)
    assert shown.exit_code == 2
    assert "--at" in shown.error
    assert "--bundle" in shown.error


def test_rows_are_aligned_and_unusual_values_are_warned_about(tiny_fleet, tmp_path, nmoe_edge):
    bundle = read_bundle(tiny_fleet / "attic")
    least, most = bundle.manifest.input.range
    narrow = replace(bundle.manifest, input=replace(bundle.manifest.input, range=(least, most / 16)))
    write_bundle(tmp_path / "attic", narrow, bundle.contents)
    np.save(tmp_path / "eleven.npy", bright(*[0] * 11))
    shown = nmoe_edge("infer", tmp_path / "eleven.npy", "--bundle", tmp_path / "attic")
    assert shown.exit_code == 0, shown.error
    lines = shown.output.splitlines()
    assert ["eleven.npy[ 0]  top" in lines[0], "eleven.npy[10]  top" in lines[10]] == [True, True]
    warning = "eleven.npy: values from 10 to 200; the model was calibrated on 0 to 15.9375\n"
    assert [line.endswith(warning) for line in shown.error.splitlines(keepends=True) if "warning" in line] == [True]


def test_a_device_asks_another_by_name_and_with_its_own_key(keyed, nmoe_edge, tmp_path):
    board = tmp_path / "board"
    board.mkdir()
    shutil.copy(keyed / FLEET_FILE, board)
    ask = ("status", "--at", "attic", "--fleet", board)
    with Processes(keyed, "attic"):
        bare = nmoe_edge(*ask)
        assert (bare.exit_code, bare.error.count("\n")) == (1, 1)
        assert "give the key file of a device with --key" in bare.error
        shutil.copy(tmp_path / "fleet-keys" / "cellar.key", board)
        shown = nmoe_edge(*ask)
        assert (shown.exit_code, shown.error) == (0, "")
        assert "attic, expert 0 of 3" in shown.output
        write_key(board / "strange.key", make_pair())
        assert "not the key of a device" in nmoe_edge(*ask, "--key", board / "strange.key").error


def test_ctrl_c_ends_status_watch_without_an_error(fleet, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "nmoe_edge", "status", "--watch", "--json", "--at", "attic"]
    with (
        Processes(fleet, "attic"),
        subprocess.Popen(
            [*command, "--fleet", str(fleet)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as watch,
    ):
        try:
            assert json.loads(watch.stdout.readline())["device"] == "attic"
            watch.send_signal(signal.SIGINT)
            _, error = watch.communicate(timeout=30)
        finally:
            watch.kill()
    assert (watch.returncode, error) == (0, "")


def test_keygen_replaces_a_key_that_is_elsewhere_only_by_force(keyed, nmoe_edge, tmp_path):
    path, key = keyed / FLEET_FILE, tmp_path / "fleet-keys" / "barn.key"
    before = path.stat().st_mtime_ns
    assert "nothing to do" in nmoe_edge("keygen", keyed).output
    assert path.stat().st_mtime_ns == before
    key.rename(keyed / "barn.key")  # where a device has it
    assert "nothing to do" in nmoe_edge("keygen", keyed, "--device", "barn").output
    (keyed / "barn.key").rename(tmp_path / "barn.key")
    for wrong in (None, make_pair()):
        if wrong is not None:
            write_key(key, wrong)
        refused = nmoe_edge("keygen", keyed)
        assert (refused.exit_code, refused.error.count("\n")) == (1, 1)
        for named in ("barn", str(path), str(key)):
            assert named in refused.error
    assert path.stat().st_mtime_ns == before
    others = [read_fleet(path).named(name) for name in ("attic", "cellar")]
    assert nmoe_edge("keygen", keyed, "--force").exit_code == 0
    assert read_fleet(path).named("barn").public_key == wrong.public
    assert [read_fleet(path).named(name) for name in ("attic", "cellar")] == others


def test_infer_answers_a_picture_from_a_bundle(tiny_fleet, tmp_path, nmoe_edge):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(bright(2)[0, 0]).save(tmp_path / "picture.png")
    shown = nmoe_edge("infer", tmp_path / "picture.png", "--bundle", tiny_fleet / "cellar")
    assert shown.exit_code == 0, shown.error
    assert "bottom" in shown.output
    assert "by expert 2" in shown.output
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    refused = nmoe_edge("infer", tmp_path / "broken.png", "--bundle", tiny_fleet / "cellar")
    assert (refused.exit_code, refused.error.count("\n")) == (1, 1)


def test_serve_help_shows_an_example():
    shown = subprocess.run([sys.executable, "-m", "nmoe_edge", "serve", "--help"], capture_output=True, text=True)
    assert "Examples:\n    nmoe-edge serve" in shown.stdout
