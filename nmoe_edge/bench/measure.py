"""What a device takes: its graphs in processes of their own, a peer's expert, the fleet through a device that serves.

Everything is measured in rounds: how far rounds lie apart says how much of a difference is noise. No device is
served from here while the graphs are measured.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from nmoe_edge import __version__
from nmoe_edge.bench.board import Meter, read_machine, read_moment
from nmoe_edge.bench.load import Drive, Question, asking, drive, greet, inferring, message_bytes, poisson, settled
from nmoe_edge.bench.probe import BATCHES, Probe
from nmoe_edge.bench.record import SCHEMA, Peers, Record, Row, Stage, Start, Subject, Tally
from nmoe_edge.bundle.fleet import FLEET_FILE, Device, read_fleet
from nmoe_edge.bundle.folder import Bundle, read_bundle
from nmoe_edge.client import Client, Line
from nmoe_edge.common.schema import from_plain, parse_json
from nmoe_edge.device.membership import find_membership
from nmoe_edge.errors import BenchError, CallError, EdgeError
from nmoe_edge.keys import address_of, keys_to
from nmoe_edge.status import PeerReport, StatusReport

Say = Callable[[str], None]
_HERE = Path(__file__).resolve().parents[2]
"""Where our processes run: what lies where somebody types a command is not to be imported."""
_MOST_PROBE_S = 600.0
_READY_S, _ACQUAINTED_S, _LEAVE_S = 60.0, 3.0, 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    bundle: Path
    threads: tuple[int, ...] = (1,)
    provider: str = "auto"
    at: tuple[str, ...] = ()
    """Peers' addresses."""
    latents: tuple[str, ...] = ("int8", "float16", "float32")
    fleet: Path | None = None
    key: Path | None = None
    duration_s: float = 10.0
    """Of each scenario, all rounds together."""
    rounds: int = 5
    clients: int = 1
    rate: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("duration", self.duration_s), ("rate", self.rate or 1.0)):
            if not 0 < value < float("inf"):  # so written, NaN is refused too
                raise BenchError(f"{what} is {value}, not a number over 0")
        if os.path.isfile(self.bundle / FLEET_FILE):
            raise BenchError(f"{self.bundle} is a whole fleet; measure one of its devices: {self.bundle}/NAME")


def measure(plan: Plan, say: Say) -> Record:
    """Carry a plan out; say: told what is being done.

    Whoever stops it, by Ctrl-C or by an error of ours on the way, has the rounds that were whole by then.
    """
    bundle = read_bundle(plan.bundle)
    manifest = bundle.manifest
    began, before = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), read_moment()
    _try_out(plan, bundle, say)
    probes: dict[int, list[tuple[int, Probe]]] = {threads: [] for threads in plan.threads}
    numbers = itertools.count(secrets.randbits(60))
    met: _Met | None = None
    doing, stopped = "", None

    def begin(turn: int, what: str) -> None:
        nonlocal doing
        doing = f"round {turn + 1} of {plan.rounds}: {what}"
        say(doing)

    with contextlib.ExitStack() as stack:
        series = [one for address in dict.fromkeys(plan.at) for one in _peer(plan, bundle, address, stack)]
        if len({one.what for one in series}) < len(set(plan.at)):
            raise BenchError("two --at lead to the same device; name it once")
        try:
            for turn in range(plan.rounds):
                for threads, found in probes.items():
                    begin(turn, f"the graphs, {_threads(threads)}")
                    found.append(_probed(plan, threads, manifest.digest))
            if plan.fleet is not None:
                doing = "meeting the fleet"
                met = stack.enter_context(_met(plan, bundle, plan.fleet, say))
                series += _fleet(plan, bundle, met, stack)
            for turn in range(plan.rounds):
                for one in series:
                    begin(turn, f"{one.what}, {one.setting}, {one.rows} a message")
                    one.measure(numbers, plan.duration_s / plan.rounds)
            peers = None if met is None else Peers(met.known, met.alive, _alive(met.client.status()))
        except (KeyboardInterrupt, EdgeError) as why:
            if not all(probes.values()):
                raise
            stopped = f"stopped in {doing}" + (f": {why}" if isinstance(why, EdgeError) else "")
            peers = None if met is None else Peers(met.known, met.alive)
        remote = [one.row() for one in series if one.drives]
    local = [row for threads, found in probes.items() for row in _local_rows(threads, found)]
    (_, probe), *_ = probes[plan.threads[0]]
    precision = manifest.precision
    return Record(
        schema=SCHEMA,
        began=began,
        nmoe=__version__,
        python=platform.python_version(),
        runtime=probe.runtime,
        provider=probe.provider,
        machine=read_machine(),
        before=before,
        after=read_moment(),
        bundle=Subject(
            manifest.device,
            manifest.digest,
            f"extractor {precision.extractor}, gate {precision.gate}, expert {precision.expert}",
            manifest.latent.dtype,
            {name: entry.bytes for name, entry in manifest.files.items()},
        ),
        duration_s=plan.duration_s,
        starts=tuple(_start(threads, found) for threads, found in probes.items()),
        rows=(*local, *remote),
        peers=peers,
        stopped=stopped,
    )


def _try_out(plan: Plan, bundle: Bundle, say: Say) -> None:
    """Refuse before the first round what would be refused after minutes."""
    if plan.provider != "auto":
        from nmoe_edge.models import check_installed  # and onnxruntime, which nothing else here needs

        check_installed(plan.provider)
    find_membership(plan.fleet, bundle.manifest, plan.key)
    if plan.fleet is not None:
        with _met(plan, bundle, plan.fleet, lambda text: say(f"first a trial: {text}")):
            pass


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _probed(plan: Plan, threads: int, digest: str) -> tuple[int, Probe]:
    """When a fresh process was begun, and what it saw."""
    arguments = [str(plan.bundle.absolute()), str(threads), plan.provider, str(plan.duration_s / plan.rounds)]
    command = [sys.executable, "-m", "nmoe_edge.bench.probe", *arguments]
    began = time.monotonic_ns()
    try:
        done = subprocess.run(  # noqa: S603  # ourselves
            command, capture_output=True, text=True, cwd=_HERE, timeout=_MOST_PROBE_S + 10 * plan.duration_s
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{plan.bundle}: answered nothing for minutes with {_threads(threads)}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"its process ended by {done.returncode}"]
        raise BenchError(f"{_threads(threads)}: {last[0]}")
    probe = from_plain(Probe, parse_json(done.stdout.splitlines()[-1]))  # a GPU's runtime may have its say before
    if probe.digest != digest:
        raise BenchError(f"{plan.bundle}: another bundle took its place; measure that one")
    return began, probe


def _start(threads: int, found: list[tuple[int, Probe]]) -> Start:
    stages = []
    for marks in zip(*(probe.marks for _, probe in found), strict=True):
        at = tuple(mark.at_ns - began for mark, (began, _) in zip(marks, found, strict=True))
        stages.append(Stage(marks[0].stage, at, tuple(mark.rss for mark in marks)))
    memory = (tuple(probe.pss for _, probe in found), tuple(probe.peak for _, probe in found))
    return Start(_threads(threads), tuple(stages), *memory)


def _local_rows(threads: int, found: list[tuple[int, Probe]]) -> Iterator[Row]:
    setting, probes = _threads(threads), [probe for _, probe in found]
    opened = [next(mark.at_ns for mark in probe.marks if mark.stage == "expert") - began for began, probe in found]
    yield Row("start", "process to sessions open", setting, 1, tuple((ns,) for ns in opened))
    yield Row("start", "first answer", setting, 1, tuple((probe.first_ns,) for probe in probes))
    for i, rows in enumerate(BATCHES):
        batches = [probe.batches[i] for probe in probes]
        calm, mean_w = all(batch.settled for batch in batches), _mean([batch.mean_w for batch in batches])
        for step in batches[0].samples:
            parts = tuple(batch.samples[step] for batch in batches)
            yield Row("local", step, setting, rows, parts, calm, mean_w)


def _mean(watts: list[float | None]) -> float | None:
    known = [watt for watt in watts if watt is not None]
    return mean(known) if len(known) == len(watts) else None


@dataclass(slots=True)
class _Series:
    """Something that is asked over the wire, round after round."""

    scenario: Literal["peer", "fleet"]
    what: str
    setting: str
    rows: int
    line: Line
    question: Question
    clients: int = 1
    rate: float | None = None
    own: int = -1
    drives: list[Drive] = field(default_factory=list)
    watts: list[float | None] = field(default_factory=list)
    calm: bool = True

    def measure(self, numbers: Iterator[int], seconds: float) -> None:
        """One round."""
        self.calm &= settled(self.line, self.question, numbers, self.clients)
        meter, arrivals = Meter(time.monotonic_ns()), None
        if self.rate is not None:
            arrivals = poisson(self.rate, seed=len(self.drives))
        clients = self.clients if arrivals is None else 0
        found = drive(
            self.line, self.question, numbers, seconds, clients=clients, arrivals=arrivals, own=self.own, meter=meter
        )
        if not found.took_ns:
            why = f"of {found.asked} questions in {seconds:.3g} s none was answered, {found.refused} were refused"
            raise BenchError(
                f"{self.what}, {self.setting}: {why}; try another --rate, or a longer --duration. {found.refusal}"
            )
        self.drives.append(found)
        self.watts.append(meter.mean_w)

    def row(self) -> Row:
        """All rounds."""
        answer = next(found.answer for found in self.drives if found.answer is not None)
        total = [sum(getattr(found, name) for found in self.drives) for name in Tally.__dataclass_fields__]
        return Row(
            self.scenario,
            self.what,
            self.setting,
            self.rows,
            tuple(tuple(found.took_ns) for found in self.drives),
            self.calm,
            _mean(self.watts),
            message_bytes(self.question(0)) / self.rows,
            message_bytes(answer) / self.rows,
            Tally(*total),
        )


def _peer(plan: Plan, bundle: Bundle, address: str, stack: contextlib.ExitStack) -> Iterator[_Series]:
    """A remote expert, for every dtype that latents travel in."""
    manifest = bundle.manifest
    line = Line(address_of(address, plan.fleet), *keys_to(address, plan.fleet, plan.key, manifest.device))
    stack.callback(line.close)
    welcome = greet(line, manifest)
    for dtype in plan.latents:
        for rows in BATCHES:
            question = asking(bundle.selftest.latents, dtype, rows, welcome.expert, manifest.trunk_bytes)
            yield _Series("peer", f"ask of expert {welcome.expert}", dtype, rows, line, question)


@dataclass(frozen=True, slots=True)
class _Met:
    """The device of this bundle, that serves and has met its peers."""

    client: Client
    access: tuple[Any, ...]
    setting: str
    known: int
    alive: int


@contextlib.contextmanager
def _met(plan: Plan, bundle: Bundle, fleet: Path, say: Say) -> Iterator[_Met]:
    """It is served meanwhile, unless it is already; BenchError where the fleet is not there."""
    manifest = bundle.manifest
    device = read_fleet(fleet).named(manifest.device)
    access = keys_to(device.address, fleet, plan.key, device.name)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(device.address, *access))
        if _facts(client) is None:
            say(f"nobody answers at {device.address}: serving {device.name} for as long as it takes")
            stack.enter_context(_serving(plan, fleet, device, client))
        facts = _acquainted(client)
        if facts.get("bundle") != manifest.digest:
            raise BenchError(
                f"{device.address}: serves another bundle than {plan.bundle}; stop it, or measure that one"
            )
        known, alive = len(_peers(facts)), _alive(facts)
        if known and not alive:
            raise BenchError(
                f"{device.name} reaches none of the {known} peers in {fleet}: serve them too, or leave out --fleet"
            )
        say(f"{device.name} knows {alive} of its {known} peers to be alive")
        # Whoever serves it already may have chosen other threads than ours.
        yield _Met(client, access, f"{device.name}, {_threads(facts['threads'])}", known, alive)


def _peers(facts: StatusReport) -> list[PeerReport]:
    """None where it is no device that says of itself what ours do."""
    return facts.get("peers") or []


def _alive(facts: StatusReport) -> int:
    return sum(peer["state"] == "alive" for peer in _peers(facts))


def _fleet(plan: Plan, bundle: Bundle, met: _Met, stack: contextlib.ExitStack) -> Iterator[_Series]:
    """The whole path through the device of this bundle."""
    manifest, address = bundle.manifest, met.client.address
    question = inferring(bundle.selftest.inputs)

    def series(what: str, clients: int, rate: float | None) -> _Series:
        line = Line(address, *met.access, connections=clients)
        stack.callback(line.close)
        return _Series("fleet", what, met.setting, 1, line, question, clients, rate, manifest.expert)

    yield series(f"closed loop, {plan.clients} client{'s' if plan.clients > 1 else ''}", plan.clients, None)
    if plan.rate is not None:
        yield series(f"open loop, {plan.rate:g}/s", 1, plan.rate)


def _facts(client: Client) -> StatusReport | None:
    with contextlib.suppress(CallError):  # nobody is there
        return client.status(1.0)
    return None


def _acquainted(client: Client) -> StatusReport:
    """The status of a device that has met its peers, or has had the time to."""
    until = time.monotonic() + _ACQUAINTED_S
    while True:
        facts = client.status()
        if _alive(facts) == len(_peers(facts)) or time.monotonic() > until:
            return facts
        time.sleep(0.1)


@contextlib.contextmanager
def _serving(plan: Plan, fleet: Path, device: Device, client: Client) -> Iterator[None]:
    """`nmoe-edge serve` in a process of its own; what it learns is forgotten."""
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise BenchError(f"no temporary folder: {error.strerror}; set TMPDIR to one that can be written") from error
    with folder as state, (Path(state) / "log").open("w+") as log:
        options = ["--fleet", fleet, "--state", state, "--threads", plan.threads[0], "--provider", plan.provider]
        if plan.key is not None:
            options += ["--key", plan.key]
        absolute = [str(o.absolute() if isinstance(o, Path) else o) for o in (plan.bundle, *options)]
        command = [sys.executable, "-m", "nmoe_edge", "serve", *absolute]
        # In a session of its own: a terminal that is closed would tell it to reload, and Ctrl-C to leave before we do.
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=_HERE, start_new_session=True)  # noqa: S603
        try:
            until = time.monotonic() + _READY_S
            while _facts(client) is None:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    last = log.read().strip().splitlines()[-1:] or ["it says nothing"]
                    raise BenchError(f"{device.name} cannot be served: {last[0].removeprefix('nmoe-edge: ')}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
