"""Runs devices on a Raspberry Pi emulated by qemu: `make test-arm`, or python tests/rigs/arm.py [PART...]

Installs the wheel of this repository in an arm64 Debian, from wheels only and without a compiler, as on a board. Then
it replays self-tests, serves fleets on both machines together, limits a device to a small board's memory, and runs
the tests of nmoe_edge. Prints each result and exits 1 if one is wrong; prints "skipped: …" and exits 0 without qemu.
Speed is not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]

from edge.fleets import Processes, copied_fleet, serve_command  # noqa: E402
from qemu import NEWER, OLDER, PLATFORMS, PYTHON, Arm, Skipped, capped, debian, prepare, run, say  # noqa: E402

from nmoe_edge.bundle.fleet import read_fleet_folder  # noqa: E402
from nmoe_edge.bundle.folder import read_bundle  # noqa: E402
from nmoe_edge.errors import CallError  # noqa: E402

DEADLINE_S = 240.0
PATIENT = ("--deadline-ms", f"{1000 * DEADLINE_S:.0f}", "--local-first", "1", "--no-hedge", "--no-adapt")
"""Only the gate decides, and slow emulated experts are waited for."""
FUZZ_EXAMPLES = 1000
"""For each fuzz test. A machine that is not emulated runs 50,000."""
BOARD_MB = 512
"""Memory of a Raspberry Pi Zero 2 W."""

failures = []
"""Names of the checks that failed."""


def show(check, measured, passed=True):
    """Print one line of the result."""
    print(f"{check:<52} {measured}{'' if passed else '   FAILED'}", flush=True)
    if not passed:
        failures.append(check)


def install(arm):
    """Build the wheel and install it with its dependencies for arm64, like `pip install 'nmoe[edge]'` on a board."""
    say("building the wheel, downloading its dependencies for arm64")
    source = arm.work / "source"
    wheels = arm.work / "wheels"
    source.mkdir()
    for path in ROOT.glob("nmoe_*"):
        shutil.copytree(path, source / path.name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source, stdout=subprocess.PIPE)
    (wheel,) = wheels.glob("nmoe-*.whl")
    kinds = [f"--platform={kind}" for kind in PLATFORMS]
    fetch = ("download", "-qq", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *kinds)
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(sys.executable, "-m", "pip", *fetch, *constraints, "--dest", wheels, f"{wheel}[edge,discover,test]")
    say("installing nmoe[edge] in the emulated Debian")
    run(*arm("python3", "-m", "venv", "/mnt/venv"))
    pip(arm, "nmoe[edge]")
    versions = "import platform, onnxruntime as o, numpy as n, zmq as z; print(platform.machine(), o.__version__, "
    versions += "n.__version__, z.__version__, z.zmq_version(), platform.python_version())"
    machine, *found = run(*arm("/mnt/venv/bin/python", "-c", versions), stdout=subprocess.PIPE).stdout.split()
    names = ("onnxruntime", "numpy", "pyzmq", "libzmq", "Python")
    show(f"pip install 'nmoe[edge]' on {machine}", ", ".join(map(" ".join, zip(names, found, strict=True))))
    compilers = run(*arm("sh", "-c", "which cc gcc make || true"), stdout=subprocess.PIPE).stdout.split()
    show("compilers installed", ", ".join(compilers) or "none", not compilers)


def pip(arm, requirement):
    """Install a requirement in the emulated Debian, from the wheels of this run only."""
    offline = ("--no-index", "--find-links=/mnt/wheels", "--only-binary=:all:", "--quiet", "--root-user-action=ignore")
    run(*arm("/mnt/venv/bin/pip", "--disable-pip-version-check", "install", *offline, requirement))


def export(work):
    """Train and export three fleets on this machine: digits in float and for a Pi, and a ResNet18 in int8 for a Pi."""
    import torch
    from torch import nn

    from nmoe_export.export import Options, export_fleet
    from nmoe_export.source import of_modules
    from nmoe_train.nets import NetSpec, build

    fleets = work / "fleets"
    run_folder = work / "run"
    fleets.mkdir()
    say("training digits, exporting them and a ResNet18")
    train = Path(sys.executable).with_name("nmoe-train")
    to_bundles = Path(sys.executable).with_name("nmoe-export")
    run(train, "run", "--clients", "4", "--top-k", "2", "--out", run_folder)
    run(to_bundles, run_folder, "--out", fleets / "digits")
    run(to_bundles, run_folder, "--int8", "--target", "pi", "--out", fleets / "digits-pi")
    torch.manual_seed(0)
    extractor = build(NetSpec("resnet18", {"channels": 3, "size": 32, "dim": 512, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (128, 3, 32, 32)).astype(np.uint8)
    experts = [nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)) for _ in range(2)]
    source = of_modules(extractor, nn.Linear(512, 2), experts, images, top_k=2)
    # It is untrained, so there is no accuracy to lose.
    export_fleet(source, fleets / "resnet18-pi", Options("int8", "pi", max_drop=100.0))
    for folder in sorted(fleets.iterdir()):
        kinds = read_bundle(folder / "device-00").manifest.precision
        show(f"exported {folder.name}", f"extractor {kinds.extractor}, gate {kinds.gate}, expert {kinds.expert}")


def selftest(arm):
    """Replay the self-test of every bundle of every fleet on two emulated CPUs."""
    for folder in sorted((arm.work / "fleets").iterdir()):
        for cpu in (OLDER, NEWER):
            say(f"selftest of {folder.name} on a {cpu}")
            command = arm("/mnt/venv/bin/nmoe-edge", "selftest", "--json", arm.there(folder), cpu=cpu)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            results = [json.loads(line) for line in done.stdout.splitlines()]
            tests = {name: bundle.selftest for name, bundle in read_fleet_folder(folder)[1].items()}
            parts = [f"{sum(result['passed'] for result in results)} of {len(tests)} bundles passed"]
            for kind in ("latent", "output"):
                worst = max((result[f"{kind}_difference"] for result in results), default=float("nan"))
                allowed = min(getattr(test, f"{kind}_tolerance") for test in tests.values())
                parts.append(f"{kind}s differ by {worst:.1g} (allowed {allowed:.1g})")
            show(f"selftest on a {cpu}: {folder.name}", "; ".join(parts), done.returncode == 0)


class Boards(Processes):
    """Devices of a fleet, some of them on the emulated board, some with a memory limit."""

    def __init__(self, folder, arm, on_arm=(), within=None):
        """on_arm: names of the devices to emulate; within: name -> the command prefix that limits it"""
        self._arm = arm
        self._on_arm = on_arm
        self._within = within or {}
        super().__init__(folder, *read_fleet_folder(folder)[1], options=PATIENT)

    def command(self, name):
        """The command that serves a device, on this machine or on the emulated one."""
        command = serve_command(self.folder, name, *self.options)
        if name in self._on_arm:
            bundle = self._arm.there(self.folder / name)
            command = self._arm("/mnt/venv/bin/nmoe-edge", "serve", bundle, "--state", "/mnt/state", *self.options)
        return [*self._within.get(name, ()), *command]

    def peak(self, name):
        """Its peak memory, or its exit status if it is no longer running."""
        code = self.running[name].poll()
        if code is not None:
            return f"the device ended with exit status {code}"
        status = Path(f"/proc/{self.running[name].pid}/status").read_text()
        return f"{int(re.search(r'VmHWM:[^0-9]+([0-9]+)', status)[1]) / 1024:.0f} MB at most"


def combined(bundles, origin, inputs):
    """What `origin` answers to these inputs when the whole fleet runs in one process, with the same frames."""
    path = ROOT / "examples" / "one_process_fleet.py"
    spec = importlib.util.spec_from_file_location("one_process_fleet", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    outputs, rows, _ = example.answer({origin: bundles[origin], **bundles}, inputs)
    return outputs, rows


def samples(arm, name, bundles, count):
    """Inputs for a fleet: held-out digits, or noise for the untrained ResNet."""
    if "digits" in name:
        with np.load(arm.work / "run" / "calibration.npz") as arrays:
            return arrays["inputs"][:count]
    shape = next(iter(bundles.values())).manifest.input.shape
    return np.random.default_rng(1).integers(0, 256, (count, *shape)).astype(np.uint8)


def pair(arm):
    """Devices on both machines ask each other, over CURVE; answers are compared with a fleet in one process."""
    for source in sorted((arm.work / "fleets").iterdir()):
        folder = copied_fleet(source, arm.work / "pair" / source.name, keyed=True)
        _, bundles = read_fleet_folder(folder)
        on_x86 = list(bundles)[::2]
        on_arm = list(bundles)[1::2]
        inputs = samples(arm, source.name, bundles, 128)
        say(f"{source.name}: {', '.join(on_x86)} on this machine, {', '.join(on_arm)} emulated")
        with Boards(folder, arm, on_arm=on_arm) as boards:
            for origin in (on_x86[0], on_arm[0]):
                boards.wait_for_peers(origin)
                with boards.client(origin) as client:
                    answers = client.infer(inputs, DEADLINE_S)
                machine = "Arm" if origin in on_arm else "x86"
                compare(f"{source.name}, answered by {machine}", answers, bundles, origin, inputs)


def compare(check, answers, bundles, origin, inputs):
    """Compare answers with a fleet in one process: the same experts, and outputs within the self-test's tolerance."""
    outputs, rows = combined(bundles, origin, inputs)
    experts = sum(set(a.experts) == set(b.experts) for a, b in zip(answers.rows, rows, strict=True))
    labels = int((answers.outputs.argmax(1) == outputs.argmax(1)).sum())
    differs = float(np.abs(answers.outputs - outputs).max())
    allowed = bundles[origin].selftest.output_tolerance
    show(
        check,
        f"{len(rows)} rows, {experts} by the same experts, {labels} with the same label;"
        f" outputs differ by {differs:.1g} (allowed {allowed:.1g})",
        experts == len(rows) and differs <= allowed,
    )


def memory(arm):
    """Limit a device to the memory of a small board: many requests, then one with very many rows."""
    source = arm.work / "fleets" / "resnet18-pi"
    for machine, requests, many_rows in (("x86", 2000, 4096), ("Arm", 100, 128)):
        folder = copied_fleet(source, arm.work / "memory" / machine, keyed=True)
        _, bundles = read_fleet_folder(folder)
        small, other = bundles
        inputs = samples(arm, source.name, bundles, 64)
        wanted, _ = combined(bundles, small, inputs)
        say(f"{requests} requests, then one of {many_rows} rows, within {BOARD_MB} MB on {machine}")
        with (
            capped(BOARD_MB) as within,
            Boards(folder, arm, on_arm=[small] if machine == "Arm" else [], within={small: within}) as boards,
        ):
            boards.wait_for_peers(small)
            boards.wait_for_peers(other)  # it asks the limited device's expert too
            allowed = bundles[small].selftest.output_tolerance
            share = (inputs, wanted, allowed, requests // 4)
            clients = [ClientThread(boards, name, *share) for name in (small, other) * 2]
            for one in clients:
                one.start()
            for one in clients:
                one.join()
            counts = sum((one.counts for one in clients), Counter())
            outcome = ", ".join(f"{counts[kind]} {kind}" for kind in ("right", "degraded", "wrong", "refused"))
            passed = counts["right"] + counts["degraded"] == requests
            show(f"{BOARD_MB} MB on {machine}: {requests} requests", f"{outcome}; {boards.peak(small)}", passed)
            with boards.client(small) as client:
                try:
                    many = client.infer(np.resize(inputs, (many_rows, *inputs.shape[1:])), DEADLINE_S).outputs
                    differs = float(np.abs(many - np.resize(wanted, many.shape)).max())
                    outcome = f"answered, outputs differ by {differs:.1g}"
                    passed = differs <= allowed
                except CallError as error:
                    outcome = str(error)
                    passed = False
            show(f"  then one of {many_rows} rows", f"{outcome}; {boards.peak(small)}", passed)


class ClientThread(threading.Thread):
    """A client in a thread: every 16th request has all rows, the others have one."""

    def __init__(self, boards, name, inputs, wanted, allowed, requests):
        super().__init__(daemon=True)
        self.counts = Counter()
        self._boards = boards
        self._device = name
        self._inputs = inputs
        self._wanted = wanted
        self._allowed = allowed
        self._requests = requests

    def run(self):
        """Send all requests and count the outcomes."""
        with self._boards.client(self._device) as client:
            for number in range(self._requests):
                row = number % len(self._inputs)
                rows = slice(None) if number % 16 == 15 else slice(row, row + 1)
                self.counts[self._outcome(client, rows)] += 1

    def _outcome(self, client, rows):
        try:
            answers = client.infer(self._inputs[rows], DEADLINE_S)
        except CallError as error:
            say(f"refused: {error}")
            return "refused"
        if any(row.degraded for row in answers.rows):  # an expert may be late on a busy machine
            return "degraded"
        return "right" if np.abs(answers.outputs - self._wanted[rows]).max() <= self._allowed else "wrong"


def tests(arm):
    """Run the tests of nmoe_edge with the installed wheel."""
    say("tests/edge and tests/test_golden.py, emulated: about six minutes")
    repository = arm.work / "repository"
    report = arm.work / "tests.xml"
    shutil.copytree(TESTS, repository / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", repository)
    pip(arm, "nmoe[discover,test]")
    options = f"-p no:cacheprovider --fuzz-examples {FUZZ_EXAMPLES} --junitxml /mnt/{report.name}"
    script = f"cd /mnt/repository && /mnt/venv/bin/python -m pytest {options} tests/edge tests/test_golden.py"
    done = subprocess.run(arm("sh", "-c", script, alone=True), stdout=sys.stderr, check=False)
    suite = ElementTree.parse(report).getroot()[0].attrib if report.exists() else {}
    counts = ", ".join(f"{suite.get(kind, '?')} {kind}" for kind in ("tests", "failures", "errors", "skipped"))
    show("tests/edge and tests/test_golden.py on Arm", counts, done.returncode == 0)


PARTS = {"selftest": selftest, "pair": pair, "memory": memory, "tests": tests}


def main():
    """Set up the emulated board and run the chosen parts on it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tests/rigs/arm.py selftest pair",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started are ended
    try:
        prepare()
        tree = debian()
        with tempfile.TemporaryDirectory(prefix="nmoe-arm-") as work:
            arm = Arm(tree, Path(work))
            install(arm)
            if set(parts) - {"tests"}:
                export(arm.work)
            for part in parts:
                try:
                    PARTS[part](arm)
                except Skipped as why:
                    print(f"skipped: {part}: {why}")
    except Skipped as why:
        print(f"skipped: {why}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))[:200]}: exit status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    sys.exit(f"failed: {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
