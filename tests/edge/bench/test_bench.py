"""`nmoe-edge bench` with real processes and a real fleet. The tests assert no measured figure."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import get_args

import pytest
from edge.fleets import Processes, address_of, nodes, pin_bundle

from nmoe_edge.bench import probe
from nmoe_edge.bench.measure import _probe, measure
from nmoe_edge.bench.plan import Plan
from nmoe_edge.bench.probe import Probe
from nmoe_edge.bench.record import Peers, read_record
from nmoe_edge.bench.remote import Series
from nmoe_edge.bench.samples import MIN_CHANGE, SAME_WITHIN, Verdict
from nmoe_edge.bundle.fleet import FLEET_FILE, read_fleet, write_fleet
from nmoe_edge.bundle.folder import read_bundle, write_bundle
from nmoe_edge.cli import main
from nmoe_edge.client import Client
from nmoe_edge.common.schema import from_plain
from nmoe_edge.errors import BenchError, CallError
from nmoe_edge.keys import keys_to

QUICK = ("--duration", "0.5", "--rounds", "5")
BRIEF = ("--duration", "0.3", "--rounds", "1")
STAGES = ["python", "imports", "bundle", "extractor", "gate", "expert", "ready", "first answer", "steady"]


@pytest.fixture
def nmoe_edge(run_main):
    return lambda *arguments: run_main(main, *arguments)


@pytest.fixture
def quiet():
    return lambda _text: None


def test_a_bundle_is_measured_and_a_slower_record_is_worse(tiny_fleet, tmp_path, nmoe_edge):
    kept = tmp_path / "a.json"
    shown = nmoe_edge("bench", tiny_fleet / "attic", "--threads", "1,2,1", "--json", kept, *QUICK)
    assert shown.exit_code is None or shown.exit_code == 0, shown.error
    assert "| whole path" in shown.output
    assert shown.error.count("round 5 of 5") == 2
    record = read_record(kept)
    assert [start.setting for start in record.starts] == ["1 thread", "2 threads"]
    for start in record.starts:
        assert [stage.name for stage in start.stages] == STAGES
        times_of_each_round = zip(*(stage.at_ns for stage in start.stages), strict=True)
        for times in times_of_each_round:
            assert times[0] > 0
            assert list(times) == sorted(times)
    measured = {(row.what, row.setting, row.rows) for row in record.rows if row.scenario == "local"}
    steps = ("extractor", "gate", "expert", "whole path")
    assert measured == set(itertools.product(steps, ("1 thread", "2 threads"), (1, 8)))
    assert all(len(row.parts) == 5 for row in record.rows)
    assert record.bundle.digest == read_bundle(tiny_fleet / "attic").manifest.digest

    same = nmoe_edge("bench", "compare", kept, kept)
    verdicts = same.output.count("| same ") + same.output.count("| cannot tell ")
    assert (same.exit_code, verdicts) == (0, len(record.rows) + 2 * len(record.starts))
    plain = json.loads(kept.read_text())
    for name, ns in (("fast", 1000), ("slow", 2000)):  # real samples may be too noisy for a verdict
        plain["rows"][-1]["parts"] = [[ns]] * 5
        (tmp_path / f"{name}.json").write_text(json.dumps(plain))
    worse = nmoe_edge("bench", "compare", tmp_path / "fast.json", tmp_path / "slow.json")
    assert (worse.exit_code, worse.output.count("| worse ")) == (1, 1)
    better = nmoe_edge("bench", "compare", tmp_path / "slow.json", tmp_path / "fast.json")
    assert (better.exit_code, better.output.count("| better ")) == (0, 1)


def test_a_probe_prints_its_stages_and_samples(tiny_fleet, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["probe", str(tiny_fleet / "barn"), "1", "cpu", "0.1"])
    try:
        probe.main()
    finally:
        gc.unfreeze()
    seen = from_plain(Probe, json.loads(capsys.readouterr().out))
    assert [mark.stage for mark in seen.marks] == STAGES
    assert [batch.rows for batch in seen.batches] == [1, 8]
    for batch in seen.batches:
        counts = {len(samples) for samples in batch.samples.values()}
        assert counts == {len(batch.samples["gate"])}
    assert seen.provider == "CPUExecutionProvider"


def test_a_probe_imports_nothing_heavy_before_it_reads_its_memory():
    code = "import sys, nmoe_edge.bench.probe; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnxruntime", "zmq", "click", "nmoe_edge.models"} & set(loaded)


@pytest.mark.parametrize("arguments", [(), ("nowhere", "1", "cpu", "0.1")])
def test_a_probe_that_fails_prints_one_line(arguments):
    command = [sys.executable, "-m", "nmoe_edge.bench.probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@pytest.mark.socket
def test_a_peer_and_a_fleet_with_keys_are_measured_and_the_device_is_served_for_it(keyed, tmp_path, nmoe_edge):
    file, kept = keyed / FLEET_FILE, tmp_path / "a.json"
    wire = ("--at", address_of(keyed, "barn"), "--fleet", file, "--clients", "2", "--rate", "200")
    with Processes(keyed, "barn", "cellar"):
        shown = nmoe_edge("bench", keyed / "attic", *wire, "--precision", "int8,fp32", "--json", kept, *BRIEF)
    assert shown.output, shown.error
    assert "serving attic for this benchmark" in shown.error
    assert "attic reaches 2 of its 2 peers" in shown.error
    rows = {(row.scenario, row.what, row.setting, row.rows): row for row in read_record(kept).rows}
    dim = read_bundle(keyed / "attic").manifest.latent.dim
    for dtype, width in (("int8", dim + 4), ("float32", 4 * dim)):
        for n in (1, 8):
            row = rows["peer", "ask of expert 1", dtype, n]
            assert row.sent_bytes == 64 / n + width
            assert row.tally.rows == n * len(row.samples)
            assert (row.tally.refused, row.tally.unanswered) == (0, 0)
    for what in ("closed loop, 2 clients", "open loop, 200/s"):
        row = rows["fleet", what, "attic, 1 thread", 1]
        assert row.tally.asked == row.tally.rows + row.tally.refused + row.tally.unanswered
        assert 0 < row.tally.at_home < row.tally.rows  # the gate sends one of the three inputs to attic itself
    attic = address_of(keyed, "attic")
    with Client(attic, *keys_to(attic, file, None)) as client, pytest.raises(CallError):
        client.status(0.3)  # the benchmark has ended it


@pytest.mark.socket
def test_stopping_the_benchmark_ends_the_device_it_served(fleet, tmp_path):
    command = [sys.executable, "-m", "nmoe_edge", "bench", str(fleet / "attic"), "--fleet", str(fleet / FLEET_FILE)]
    kept = tmp_path / "a.json"
    command += ["--json", str(kept), "--rounds", "1", "--duration", "4"]
    with Processes(fleet, "barn"):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            while "closed loop" not in process.stderr.readline():
                assert process.poll() is None
            process.terminate()
            assert process.wait(20) == 143
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
    with Client(address_of(fleet, "attic")) as client, pytest.raises(CallError):
        client.status(0.3)
    record = read_record(kept)
    assert record.stopped == "stopped in round 1 of 1: closed loop, 1 client, attic, 1 thread, 1 row per message"
    assert {row.scenario for row in record.rows} == {"start", "local"}


@pytest.mark.parametrize(("ended_by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_complete_rounds_are_kept_when_a_signal_stops_the_benchmark(tiny_fleet, tmp_path, ended_by, status):
    kept = tmp_path / "a.json"
    command = [sys.executable, "-m", "nmoe_edge", "bench", str(tiny_fleet / "attic"), "--json", str(kept)]
    for until_round in (1, 3):
        process = subprocess.Popen([*command, "--duration", "3"], stderr=subprocess.PIPE, text=True)
        try:
            while f"round {until_round} of 5" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(ended_by)
            time.sleep(0.01)
            process.send_signal(ended_by)  # a second signal must not lose the record
            errors = process.stderr.read()
            assert process.wait(20) in (status, -ended_by)  # the second signal may come after the end
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
        assert ("nothing to report" in errors) == (not kept.exists()) == (until_round == 1)
    record = read_record(kept)
    assert record.stopped == "stopped in round 3 of 5: the graphs, 1 thread"
    assert {len(row.parts) for row in record.rows} == {2}


@pytest.mark.socket
def test_complete_rounds_are_kept_when_a_peer_dies(fleet, tmp_path, nmoe_edge, monkeypatch):
    kept, rounds = tmp_path / "a.json", []
    with Processes(fleet, "barn") as running:

        def measure_and_kill(series, *arguments):
            rounds.append(series)
            if len(rounds) == 4:
                running.kill("barn")
            return original(series, *arguments)

        original = Series.measure
        monkeypatch.setattr(Series, "measure", measure_and_kill)
        wire = ("--at", address_of(fleet, "barn"), "--latents", "fp32", "--json", kept)
        shown = nmoe_edge("bench", fleet / "attic", *wire, "--duration", "0.5", "--rounds", "3")
    record = read_record(kept)
    assert [len(row.parts) for row in record.rows if row.scenario == "peer"] == [2, 1]
    assert record.stopped.startswith("stopped in round 2 of 3: ask of expert 1, float32, 8 rows per message: tcp://")
    assert (shown.exit_code, shown.error.splitlines()[-1]) == (1, f"nmoe-edge: {record.stopped}")
    assert f"- the benchmark was {record.stopped}" in shown.output


@pytest.mark.parametrize("kind", ["fifo", "bundle", "another"])
def test_a_file_that_is_not_a_record_is_not_replaced(tiny_fleet, tmp_path, nmoe_edge, kind):
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text({"bundle": "[[device]]", "another": '{"schema": 1}'}[kind])
    shown = nmoe_edge("bench", tiny_fleet / "attic", "--json", path, *BRIEF)
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == f"nmoe-edge: {path} is not a record and is not replaced; choose another file\n"


@pytest.mark.socket
def test_two_addresses_of_one_peer_are_an_error(fleet, quiet):
    address = address_of(fleet, "barn")
    with nodes(fleet, "barn"), pytest.raises(BenchError, match="lead to the same device"):
        measure(Plan(fleet / "attic", targets=(address, address.replace("127.0.0.1", "localhost"))), quiet)


@pytest.mark.socket
def test_a_device_that_serves_already_is_asked_as_it_is(fleet):
    progress = []
    plan = Plan(fleet / "barn", fleet=fleet / FLEET_FILE, duration_s=0.2, rounds=1)
    with nodes(fleet, "barn", "attic") as (barn, _attic):
        record = measure(plan, progress.append)
        assert barn.status()["counts"]["rows"] > 0
    assert not any("serving" in text for text in progress)
    (row,) = [row for row in record.rows if row.scenario == "fleet"]
    assert row.tally.degraded > 0  # cellar is not served
    assert record.peers == Peers(2, 1, 1)


@pytest.mark.socket
def test_a_fleet_without_an_alive_peer_is_an_error_before_the_first_round(fleet):
    progress = []
    with pytest.raises(BenchError, match="attic reaches none of the 2 peers in .*: serve them too, or leave out"):
        measure(Plan(fleet / "attic", fleet=fleet / FLEET_FILE), progress.append)
    assert not any("round" in text for text in progress)


@pytest.mark.socket
def test_a_fleet_of_one_device_is_measured(fleet, quiet):
    alone = fleet / "alone.toml"
    described = read_fleet(fleet / FLEET_FILE)
    write_fleet(alone, replace(described, device=(described.named("attic"),)))
    record = measure(Plan(fleet / "attic", fleet=alone, duration_s=0.2, rounds=1), quiet)
    assert record.peers == Peers(0, 0, 0)


@pytest.mark.socket
def test_a_device_that_serves_another_bundle_is_an_error(fleet, quiet):
    with nodes(fleet, "attic", "barn"):
        bundle = read_bundle(fleet / "attic")
        pin_bundle(fleet, write_bundle(fleet.parent / "attic", replace(bundle.manifest, target="pi"), bundle.contents))
        plan = Plan(fleet.parent / "attic", fleet=fleet / FLEET_FILE, duration_s=0.1, rounds=1)
        with pytest.raises(BenchError, match="serves another bundle than"):
            measure(plan, quiet)


@pytest.mark.socket
def test_a_device_that_cannot_be_served_is_an_error_with_the_reason(fleet, quiet):
    with socket.socket() as other:  # takes the port of the device, and never answers
        other.bind(("127.0.0.1", int(address_of(fleet, "attic").rpartition(":")[2])))
        other.listen()
        plan = Plan(fleet / "attic", fleet=fleet / FLEET_FILE, duration_s=0.1, rounds=1)
        with pytest.raises(BenchError, match="attic cannot be served: .*in use"):
            measure(plan, quiet)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere",), "nowhere: not a bundle"),
        (("FLEET",), "is a fleet folder; measure one of its devices"),
        (("FLEET/attic", "--provider", "tensorrt"), "pip install 'nmoe[edge-gpu]'"),
        (("FLEET/attic", "--json", "nowhere/a.json"), "choose another file"),
        (("FLEET/attic", "--key", "some.key"), "a key needs a fleet.toml"),
        (("FLEET/attic", "--fleet", "nowhere.toml"), "nowhere.toml: No such file"),
        (("FLEET/attic", "--rate", "nan", "--fleet", "FLEET/fleet.toml"), "rate is nan"),
        (("FLEET/attic", "--at", "nonsense"), "expected tcp://HOST:PORT"),
        (("compare", "FLEET/fleet.toml", "FLEET/fleet.toml"), "fleet.toml: not a record of nmoe-edge bench"),
        (("compare", "nowhere", "nowhere"), "nowhere: No such file"),
    ],
)
def test_an_impossible_benchmark_is_one_line_and_exit_1(tiny_fleet, nmoe_edge, arguments, text):
    shown = nmoe_edge("bench", *(argument.replace("FLEET", str(tiny_fleet)) for argument in arguments))
    assert (shown.exit_code, shown.output) == (1, "")
    assert text in shown.error
    assert shown.error.count("\n") == 1  # before the first round


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--threads", "0", "x"),
        ("x", "--threads", "1,y"),
        ("x", "--latents", "int4"),
        ("x", "--rate", "5"),
        ("compare",),
    ],
)
def test_a_wrong_command_line_is_exit_2(nmoe_edge, arguments):
    assert nmoe_edge("bench", *arguments).exit_code == 2


def test_both_commands_have_a_help_text(nmoe_edge):
    assert nmoe_edge("bench", "--help").output == nmoe_edge("bench", "run", "--help").output
    assert "Examples:\n    nmoe-edge bench bundles/digits/device-00" in nmoe_edge("bench", "-h").output
    assert "\n    compare  Compare two records" in nmoe_edge("bench", "--help").output
    compare_help = nmoe_edge("bench", "compare", "--help").output
    assert "Example: nmoe-edge bench compare before.json after.json" in compare_help
    for what in (f"{1 + MIN_CHANGE:.2f}", f"1/{SAME_WITHIN:.2f} and {SAME_WITHIN:.2f}", *get_args(Verdict)[:-1]):
        assert what in compare_help


def test_a_misspelt_command_or_value_gets_a_hint(nmoe_edge):
    assert "did you mean 'compare'?" in nmoe_edge("bench", "compar", "a", "b").error
    threads = nmoe_edge("bench", "x", "--threads", "1,x").error
    assert "'x': expected numbers from 1 to 256, separated by commas" in threads


def test_two_records_without_a_verdict_are_one_line_and_exit_1(tiny_fleet, tmp_path, nmoe_edge):
    kept, other = tmp_path / "a.json", tmp_path / "b.json"
    nmoe_edge("bench", tiny_fleet / "attic", "--json", kept, *BRIEF)
    few = nmoe_edge("bench", "compare", kept, kept)
    assert (few.exit_code, few.error.count("\n")) == (1, 1)
    assert "no row has five rounds in both records" in few.error
    other.write_text(json.dumps(json.loads(kept.read_text()) | {"rows": []}))
    none = nmoe_edge("bench", "compare", kept, other)
    assert (none.exit_code, none.error.count("\n")) == (1, 1)
    assert "have no row in common" in none.error


def test_a_bundle_that_is_replaced_during_the_benchmark_is_an_error(tiny_fleet):
    plan = Plan(tiny_fleet / "attic", duration_s=0.1, rounds=1)
    other_digest = read_bundle(tiny_fleet / "barn").manifest.digest
    with pytest.raises(BenchError, match="the bundle was replaced during the benchmark"):
        _probe(plan, 1, other_digest)


@pytest.mark.socket
def test_a_rate_without_a_request_in_time_is_an_error(fleet, quiet):
    plan = Plan(fleet / "barn", fleet=fleet / FLEET_FILE, duration_s=0.1, rounds=1, rate=0.01)
    with nodes(fleet, "barn", "attic"):
        stopped = measure(plan, quiet).stopped
    assert "was answered, 0 were refused; use another --rate" in stopped


def test_a_probe_that_dies_without_a_message_is_an_error(tiny_fleet, quiet, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(BenchError, match="1 thread: its process ended with status 1"):
        measure(Plan(tiny_fleet / "attic"), quiet)
