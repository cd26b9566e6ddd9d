"""What a Raspberry Pi will run, run by qemu: `make test-arm`, or python tests/rigs/arm.py [PART...]

The wheel of this repository is installed in a Debian for arm64 as on a board, from wheels alone and without a compiler;
fleets that were trained and exported here are replayed there, served there and here together, and with a small board's
memory; the device's own tests are run. Prints what was seen, and exits 1 when something did not hold; says "skipped: …"
and exits 0 where qemu is not to be had. Of speed this says nothing.
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

from edge.fleets import Processes, serve_command, settled  # noqa: E402
from qemu import NEWER, OLDER, PLATFORMS, PYTHON, Arm, Skipped, capped, debian, prepare, run, say  # noqa: E402

from nmoe_edge.bundle.fleet import read_fleet_folder  # noqa: E402
from nmoe_edge.bundle.folder import read_bundle  # noqa: E402
from nmoe_edge.errors import CallError  # noqa: E402

DEADLINE_S = 240.0
PATIENT = ("--deadline-ms", f"{1000 * DEADLINE_S:.0f}", "--local-first", "1", "--no-hedge", "--no-adapt")
"""The gate alone decides, and emulated experts are waited for."""
FUZZ_EXAMPLES = 1000
"""Of each fuzz test; 50,000 are for a machine that is not emulated."""
BOARD_MB = 512
"""Of a Raspberry Pi Zero 2 W."""

bad = []
"""What should hold, and did not."""


def show(what, seen, holds=True):
    """A line of the result."""
    print(f"{what:<52} {seen}{'' if holds else '   DOES NOT HOLD'}", flush=True)
    if not holds:
        bad.append(what)


def install(arm):
    """The wheel, and what it needs for an Arm machine, as `pip install 'nmoe[edge]'` on a board."""
    say("building the wheel, fetching its dependencies for arm64")
    source, wheels = arm.work / "source", arm.work / "wheels"
    source.mkdir()
    for path in (*ROOT.glob("nmoe_*"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / path.name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source, stdout=subprocess.PIPE)
    (wheel,) = wheels.glob("nmoe-*.whl")
    kinds = [f"--platform={kind}" for kind in PLATFORMS]
    fetch = ("download", "-qq", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *kinds)
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(sys.executable, "-m", "pip", *fetch, *constraints, "--dest", wheels, f"{wheel}[edge,discover,test]")
    say("installing nmoe[edge] there, under qemu")
    run(*arm("python3", "-m", "venv", "/mnt/venv"))
    pip(arm, "nmoe[edge]")
    versions = "import platform, onnxruntime as o, numpy as n, zmq as z; print(platform.machine(), o.__version__, "
    versions += "n.__version__, z.__version__, z.zmq_version(), platform.python_version())"
    said = run(*arm("/mnt/venv/bin/python", "-c", versions), stdout=subprocess.PIPE).stdout.split()
    names = ("onnxruntime", "numpy", "pyzmq", "libzmq", "Python")
    show(f"pip install 'nmoe[edge]' on {said[0]}", ", ".join(map(" ".join, zip(names, said[1:], strict=True))))
    compilers = run(*arm("sh", "-c", "which cc gcc make || true"), stdout=subprocess.PIPE).stdout.split()
    show("compilers there", ", ".join(compilers) or "none", not compilers)


def pip(arm, what):
    """Install it there from this run's wheels alone."""
    offline = ("--no-index", "--find-links=/mnt/wheels", "--only-binary=:all:", "--quiet", "--root-user-action=ignore")
    run(*arm("/mnt/venv/bin/pip", "--disable-pip-version-check", "install", *offline, what))


def export(work):
    """Fleets, made at this desk: digits in float and for a Pi, a ResNet18 in int8 for a Pi."""
    import torch
    from torch import nn

    from nmoe_export.export import Options, export_fleet
    from nmoe_export.source import of_modules
    from nmoe_train.nets import NetSpec, build

    fleets, run_folder = work / "fleets", work / "run"
    fleets.mkdir()
    say("training digits, exporting them and a ResNet18")
    train, to_bundles = (Path(sys.executable).with_name(f"nmoe-{name}") for name in ("train", "export"))
    run(train, "run", "--clients", "4", "--top-k", "2", "--out", run_folder)
    run(to_bundles, run_folder, "--out", fleets / "digits")
    run(to_bundles, run_folder, "--int8", "--target", "pi", "--out", fleets / "digits-pi")
    torch.manual_seed(0)
    extractor = build(NetSpec("resnet18", {"channels": 3, "size": 32, "dim": 512, "norm": "batch"}))
    images = np.random.default_rng(0).integers(0, 256, (128, 3, 32, 32)).astype(np.uint8)
    experts = [nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)) for _ in range(2)]
    source = of_modules(extractor, nn.Linear(512, 2), experts, images, top_k=2)
    export_fleet(source, fleets / "resnet18-pi", Options("int8", "pi", max_drop=100.0))  # untrained: nothing to lose
    for folder in sorted(fleets.iterdir()):
        kinds = read_bundle(folder / "device-00").manifest.precision
        show(f"exported {folder.name}", f"extractor {kinds.extractor}, gate {kinds.gate}, expert {kinds.expert}")


def selftest(arm):
    """Every bundle of every fleet replays there what its exporter saw here."""
    for folder in sorted((arm.work / "fleets").iterdir()):
        for cpu in (OLDER, NEWER):
            say(f"selftest of {folder.name} on a {cpu}")
            command = arm("/mnt/venv/bin/nmoe-edge", "selftest", "--json", arm.there(folder), cpu=cpu)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            results = [json.loads(line) for line in done.stdout.splitlines()]
            tests = {name: bundle.selftest for name, bundle in read_fleet_folder(folder)[1].items()}
            parts = [f"{sum(result['passed'] for result in results)} of {len(tests)} bundles passed"]
            for what in ("latent", "output"):
                worst = max((result[f"{what}_difference"] for result in results), default=float("nan"))
                allowed = min(getattr(test, f"{what}_tolerance") for test in tests.values())
                parts.append(f"{what}s differ by {worst:.1g} (allowed {allowed:.1g})")
            show(f"selftest on a {cpu}: {folder.name}", "; ".join(parts), done.returncode == 0)


class Boards(Processes):
    """Devices of a fleet, some of them on the emulated board, each perhaps within a cap."""

    def __init__(self, folder, arm, on_arm=(), within=None):
        self._arm, self._on_arm, self._within = arm, on_arm, within or {}
        super().__init__(folder, *read_fleet_folder(folder)[1], options=PATIENT)

    def command(self, name):
        """To serve it where it belongs."""
        command = serve_command(self.folder, name, *self.options)
        if name in self._on_arm:
            bundle = self._arm.there(self.folder / name)
            command = self._arm("/mnt/venv/bin/nmoe-edge", "serve", bundle, "--state", "/mnt/state", *self.options)
        return [*self._within.get(name, ()), *command]

    def peak(self, name):
        """The most memory that it had; or how it ended."""
        ended = self.running[name].poll()
        if ended is not None:
            return f"the device ended with {ended}"
        status = Path(f"/proc/{self.running[name].pid}/status").read_text()
        return f"{int(re.search(r'VmHWM:[^0-9]+([0-9]+)', status)[1]) / 1024:.0f} MB at most"


def combined(bundles, origin, inputs):
    """What this device's inputs come to when the same bundles are combined in one process, through the same frames."""
    path = ROOT / "examples" / "one_process_fleet.py"
    spec = importlib.util.spec_from_file_location("one_process_fleet", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    outputs, rows, _ = example.answer({origin: bundles[origin], **bundles}, inputs)
    return outputs, rows


def samples(arm, name, bundles, count):
    """Inputs for a fleet: digits that nothing was trained on, noise for the untrained ResNet."""
    if "digits" in name:
        with np.load(arm.work / "run" / "calibration.npz") as arrays:
            return arrays["inputs"][:count]
    shape = next(iter(bundles.values())).manifest.input.shape
    return np.random.default_rng(1).integers(0, 256, (count, *shape)).astype(np.uint8)


def pair(arm):
    """A device here and one there ask each other, over CURVE; both are compared with one process."""
    for source in sorted((arm.work / "fleets").iterdir()):
        folder = settled(source, arm.work / "pair" / source.name, keyed=True)
        _, bundles = read_fleet_folder(folder)
        here, there = list(bundles)[::2], list(bundles)[1::2]
        inputs = samples(arm, source.name, bundles, 128)
        say(f"{source.name}: {', '.join(here)} here, {', '.join(there)} under qemu")
        with Boards(folder, arm, on_arm=there) as boards:
            for origin in (here[0], there[0]):
                boards.acquainted(origin)
                with boards.client(origin) as client:
                    answers = client.infer(inputs, DEADLINE_S)
                compare(
                    f"{source.name}, asked of {'Arm' if origin in there else 'x86'}", answers, bundles, origin, inputs
                )


def compare(what, answers, bundles, origin, inputs):
    """Row for row against one process: the same experts, and outputs as near as the bundle asks of any machine."""
    outputs, rows = combined(bundles, origin, inputs)
    experts = sum(set(a.experts) == set(b.experts) for a, b in zip(answers.rows, rows, strict=True))
    labels = int((answers.outputs.argmax(1) == outputs.argmax(1)).sum())
    differs, allowed = float(np.abs(answers.outputs - outputs).max()), bundles[origin].selftest.output_tolerance
    show(
        what,
        f"{len(rows)} rows, {experts} by the same experts, {labels} with the same label;"
        f" outputs differ by {differs:.1g} (allowed {allowed:.1g})",
        experts == len(rows) and differs <= allowed,
    )


def memory(arm):
    """A device with no more memory than a small board has: many requests, and one of very many rows."""
    source = arm.work / "fleets" / "resnet18-pi"
    for where, requests, most_rows in (("x86", 2000, 4096), ("Arm", 100, 128)):
        folder = settled(source, arm.work / "memory" / where, keyed=True)
        _, bundles = read_fleet_folder(folder)
        small, other = bundles
        inputs = samples(arm, source.name, bundles, 64)
        wanted, _ = combined(bundles, small, inputs)
        say(f"{requests} requests, then one of {most_rows} rows, within {BOARD_MB} MB on {where}")
        with (
            capped(BOARD_MB) as within,
            Boards(folder, arm, on_arm=(small,) * (where == "Arm"), within={small: within}) as boards,
        ):
            boards.acquainted(small)
            boards.acquainted(other)  # which asks the small one's expert in its turn
            allowed = bundles[small].selftest.output_tolerance
            share = (inputs, wanted, allowed, requests // 4)
            customers = [Customer(boards, name, *share) for name in (small, other) * 2]
            for one in customers:
                one.start()
            for one in customers:
                one.join()
            counts = sum((one.counts for one in customers), Counter())
            seen = ", ".join(f"{counts[what]} {what}" for what in ("right", "degraded", "wrong", "refused"))
            holds = counts["right"] + counts["degraded"] == requests
            show(f"{BOARD_MB} MB on {where}: {requests} requests", f"{seen}; {boards.peak(small)}", holds)
            with boards.client(small) as client:
                try:
                    many = client.infer(np.resize(inputs, (most_rows, *inputs.shape[1:])), DEADLINE_S).outputs
                    differs = float(np.abs(many - np.resize(wanted, many.shape)).max())
                    seen, holds = f"answered, outputs differ by {differs:.1g}", differs <= allowed
                except CallError as error:
                    seen, holds = str(error), False
            show(f"  then one of {most_rows} rows", f"{seen}; {boards.peak(small)}", holds)


class Customer(threading.Thread):
    """A client in a thread of its own: requests of one row and, one in sixteen, of all."""

    def __init__(self, boards, name, inputs, wanted, allowed, requests):
        super().__init__(daemon=True)
        self.counts = Counter()
        self._boards, self._device, self._requests = boards, name, requests
        self._inputs, self._wanted, self._allowed = inputs, wanted, allowed

    def run(self):
        """Ask them all."""
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
        if any(row.degraded for row in answers.rows):  # on a busy machine an expert may be too late
            return "degraded"
        return "right" if np.abs(answers.outputs - self._wanted[rows]).max() <= self._allowed else "wrong"


def tests(arm):
    """The device's own tests, with the installed wheel."""
    say("tests/edge and tests/test_golden.py, under qemu: some six minutes")
    repository, report = arm.work / "repository", arm.work / "tests.xml"
    shutil.copytree(TESTS, repository / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", repository)
    pip(arm, "nmoe[discover,test]")
    options = f"-p no:cacheprovider --fuzz-examples {FUZZ_EXAMPLES} --junitxml /mnt/{report.name}"
    script = f"cd /mnt/repository && /mnt/venv/bin/python -m pytest {options} tests/edge tests/test_golden.py"
    done = subprocess.run(arm("sh", "-c", script, alone=True), stdout=sys.stderr, check=False)
    suite = ElementTree.parse(report).getroot()[0].attrib if report.exists() else {}
    counts = ", ".join(f"{suite.get(what, '?')} {what}" for what in ("tests", "failures", "errors", "skipped"))
    show("tests/edge and tests/test_golden.py on Arm", counts, done.returncode == 0)


PARTS = {"selftest": selftest, "pair": pair, "memory": memory, "tests": tests}


def main():
    """Make the board, and what was asked for on it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tests/rigs/arm.py selftest pair",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them when none is named")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended
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
    sys.exit(f"{len(bad)} did not hold" if bad else 0)


if __name__ == "__main__":
    main()
