"""A small demo with real processes, which are really killed, and with no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from conftest import TESTS

pytestmark = pytest.mark.socket
EXAMPLES = TESTS.parent / "examples"
SMALL = "--devices=3 --seconds=4 --rate=20 --set=extractor.rounds=3 --set=gate.rounds=5 --set=data.held_out=0.3"
"""Of 144 training samples, this holds out enough for int8, which needs 64."""


def command(out, *options):
    """The command line of a small demo."""
    return [sys.executable, "-W", "error", str(EXAMPLES / "demo"), "--out", str(out), *SMALL.split(), *options]


def running(out):
    """Command lines of all processes that name the demo's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # the process has just ended
                continue
            found += [words] if any(str(out) in word for word in words) else []
    return found


def drawn(measurements):
    """The page that page.py makes of a measurements.json."""
    command = [sys.executable, str(EXAMPLES / "demo" / "page.py"), str(measurements)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sentences(page):
    """The text of a page, with a single space between words."""
    return " ".join(unescape(page).split())


def test_a_demo_loses_a_device_but_no_request_and_draws_its_measurements(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"look at {out / 'report.html'}" in done.stdout
    assert not running(out)

    measured = json.loads((out / "measurements.json").read_bytes())
    assert measured["failed"] == []
    assert measured["ways"]["unanswered"] == 0
    assert measured["rows"] == sum(measured["ways"].values()) >= 4 * 3 * 20
    ((victim, death),) = measured["deaths"].items()
    assert death["neighbour_rows"] > 0
    assert 0 < measured["moments"]["killed"] < measured["moments"]["restarted"] < measured["moments"]["known"][victim]
    assert measured["phases"]["after"]["ways"]["home"] > 0
    assert len(measured["memory_mib"]) == 3

    shown = [line for line in done.stdout.splitlines() if line.startswith("$ nmoe-")]
    programs = [" ".join(line.split()[1:3]) for line in shown]
    assert [p.removesuffix(f" {out}/run") for p in programs] == [
        *("nmoe-train run", "nmoe-train baselines", "nmoe-export", "nmoe-edge keygen", "nmoe-edge serve")
    ]

    page = (out / "report.html").read_text(encoding="utf-8")
    assert drawn(out / "measurements.json") == page  # measurements.json holds everything that the page shows
    words = sentences(page)
    for part in ("own", "iid"):
        for method in ("local", "alone", "fleet", "centralised"):
            assert f"{100 * measured['accuracy'][part][method]:.1f} %" in words
    assert f"All {measured['rows']:,} requests were answered" in words
    assert f"{death['noticed_s']:.2f} s" in words
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page

    measured["export"]["is"]["extractor"], measured["export"]["speed"]["gate"] = "int8", "unmeasured"
    measured["ways"]["unanswered"] = 3
    measured["failed"] = ["3 requests without an answer <script>"]
    (out / "measurements.json").write_text(json.dumps(measured))
    other = sentences(drawn(out / "measurements.json"))
    assert f"as exported {measured['export']['accuracy_written']:.1f} %" in other
    assert f"3 of {measured['rows']:,} requests got no answer" in other
    assert "This check failed: 3 requests without an answer <script>." in other
    assert "<script" not in drawn(out / "measurements.json")


@pytest.mark.parametrize(
    ("which", "when"), [(signal.SIGINT, "of traffic"), (signal.SIGTERM, "$ nmoe-train run")], ids=["SIGINT", "SIGTERM"]
)
def test_a_stopped_demo_ends_its_processes(tmp_path, which, when):
    out = tmp_path / "demo"
    with subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert any(when in line for line in demo.stdout)
            time.sleep(1)
            assert len(running(out)) > 1
            demo.send_signal(which)
            _, error = demo.communicate(timeout=60)
        finally:
            demo.kill()
    assert demo.returncode == 128 + which
    assert f"stopped by {which.name}" in error
    assert not running(out)


def test_a_failing_step_ends_the_demo_with_one_line(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(command(out, "--recipe", "pastry"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "demo: nmoe-train run ended with exit 2; the line above says why"
    assert not running(out)


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    why = f"{tmp_path} holds thesis.tex, which is not from a demo; choose another folder with --out"
    assert done.stderr == f"demo: {why}\n"
    assert (tmp_path / "thesis.tex").read_text() == "..."


def test_figures_are_computed_from_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    from figures import busiest, story
    from processes import Row

    def row(device, scheduled_s, latency_s=0.002, by=0, experts=(0,), **facts):
        return Row(device, "own", scheduled_s, latency_s, by, experts, (1.0,), **facts)

    rows = [
        row(0, 1.0, right=True),
        row(0, 1.5, by=0, experts=(1,), right=True),
        row(1, 2.9, latency_s=0.5, by=0),  # under way when its device was killed
        row(0, 4.0, by=0, experts=(0,), degraded=True),
        row(1, 6.1, by=1, experts=(1,)),
        row(0, 6.5, latency_s=0.1, by=0, experts=(1,)),
        row(0, 9.0),
        Row(1, "own", 9.5, 4.0),
    ]
    moments = {"killed": 3.0, "restarted": 5.0, "back": 7.0}
    moments |= {"noticed": {"barn": 3.5}, "ready": {"barn": 6.0}, "known": {"barn": 7.0}}
    found = story(rows, moments, ["attic", "barn"])
    assert found["ways"] == {"home": 3, "peers": 2, "degraded": 1, "neighbour": 1, "unanswered": 1}
    assert {name: phase["rows"] for name, phase in found["phases"].items()} == {"before": 2, "dead": 4, "after": 2}
    assert found["phases"]["before"]["right"] == {"own": 1.0, "iid": None}
    assert found["latency_ms"]["peers"]["p50"] == pytest.approx(2.0)
    barn = {"noticed_s": 0.5, "late_rows": 1, "longest_s": 0.5, "neighbour_rows": 1}
    barn |= {"ready_s": 1.0, "known_s": 2.0, "home_s": 1.102, "away_s": 1.6}
    assert found["deaths"]["barn"] == pytest.approx(barn)
    assert sum(map(sum, found["timeline"]["ways"].values())) == 7  # the last row begins the stretch that is left out
    assert busiest(rows, 1) == [1]
