"""The commands `nmoe-edge bench` and `nmoe-edge bench compare`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from nmoe_edge import options
from nmoe_edge.common.command import SETTINGS
from nmoe_edge.common.schema import nearest
from nmoe_edge.common.text import one_line
from nmoe_edge.options import LATENT_TYPES, PATH, THREADS


class _DefaultGroup(click.Group):
    """A group that passes its arguments to `run` unless the first one is the name of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._with_command(ctx, args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, self._with_command(ctx, args))

    def _with_command(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            return args
        hint = nearest(args[0], self.commands) if args else ""
        if hint and not os.path.lexists(args[0]):
            raise click.UsageError(f"{one_line(args[0])!r} is neither a bundle folder nor a command{hint}", ctx)
        return ["run", *args]


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5 alone
    """Words separated by commas; a repeated word counts once."""

    name = "list"

    def __init__(self, kind: Any, expected: str) -> None:
        self.kind = kind
        self.expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        items = []
        for word in value.split(","):
            try:
                items.append(self.kind.convert(word.strip(), param, ctx))
            except click.BadParameter:
                self.fail(f"{word!r}: expected {self.expected}, separated by commas", param, ctx)
        return tuple(dict.fromkeys(items))


class _StopSignals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, and ignores later ones.

    A second signal must not interrupt the stopping itself: the processes that the benchmark started are ended, and the
    complete rounds are written.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self.measuring = True
        """While true, a signal interrupts; afterwards it only sets the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so does the benchmark then
                signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        if self.measuring and len(self._received) == 1:
            raise KeyboardInterrupt

    @property
    def exit_status(self) -> int | None:
        """128 plus the first signal, as a shell reports it; None without a signal."""
        return 128 + self._received[0] if self._received else None


@click.group(cls=_DefaultGroup, context_settings=SETTINGS, short_help="Measure a bundle on this machine.")
def bench() -> None:
    """Measure the latency and memory of a bundle on this machine, or compare two measurements."""


@bench.command(
    epilog="""\b
Commands:
  run      Measure a bundle; `bench BUNDLE` is short for `bench run BUNDLE`.
  compare  Compare two records; see `bench compare --help`.

\b
Examples:
  nmoe-edge bench bundles/digits/device-00 --threads 1,2 --json before.json
  nmoe-edge bench device-00 --fleet fleet.toml --rate 50
  nmoe-edge bench device-00 --fleet fleet.toml --at device-01
  nmoe-edge bench compare before.json after.json
"""
)
@click.argument("bundle", type=PATH)
@click.option(
    "--threads",
    type=_List(THREADS, "numbers from 1 to 256"),
    default="1",
    show_default=True,
    metavar="N,...",
    help="CPU threads per graph; each number is measured by itself.",
)
@options.provider
@click.option(
    "--fleet",
    type=PATH,
    help="fleet.toml or its folder: also measure requests through the fleet. Its other devices must be serving.",
)
@options.own_key
@click.option(
    "--at",
    "targets",
    metavar="DEVICE",
    multiple=True,
    help="Also measure the expert of this peer: tcp://HOST:PORT or, with --fleet, its name. Repeat it for more peers.",
)
@click.option(
    "--latents",
    "--precision",
    type=_List(click.Choice(tuple(LATENT_TYPES)), f"some of {', '.join(LATENT_TYPES)}"),
    default="int8,fp16,fp32",
    show_default=True,
    metavar="TYPE,...",
    help="Number types of the latents sent to --at.",
)
@options.number(
    "--clients",
    click.IntRange(1, 256),
    default=1,
    metavar="N",
    text="Clients of the fleet; each sends its next request when the last is answered (closed loop).",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.01, 100_000),
    metavar="R",
    help="Also send the fleet R requests per second as Poisson arrivals (open loop).",
)
@options.number(
    "--duration",
    click.FloatRange(0.1, 3600),
    default=10,
    metavar="S",
    text="Seconds of measuring, all rounds together: for each number of threads, and for each table row over the wire.",
)
@options.number(
    "--rounds",
    click.IntRange(1, 30),
    default=5,
    metavar="N",
    text="Rounds that share the duration. `bench compare` needs five or more.",
)
@click.option("--json", "record_file", type=PATH, help="Write every sample to this file, for `bench compare`.")
def run(
    bundle: Path,
    threads: tuple[int, ...],
    provider: str,
    targets: tuple[str, ...],
    latents: tuple[str, ...],
    fleet: Path | None,
    key: Path | None,
    duration: float,
    rounds: int,
    clients: int,
    rate: float | None,
    record_file: Path | None,
) -> None:
    """Measure the latency and memory of BUNDLE on this machine.

    Needs only the bundle: its self-test holds the inputs. Each round runs the models in a fresh process. With --at it
    also measures a peer's expert over the network, with --fleet whole requests through the fleet.

    For --fleet, the device of BUNDLE is asked if it serves already; a device that adapts learns from these inputs.
    Otherwise the benchmark serves it, with the first number of threads.

    Ctrl-C, SIGTERM and SIGHUP stop early and keep the complete rounds.
    """
    from nmoe_edge.bench.measure import measure
    from nmoe_edge.bench.plan import Plan
    from nmoe_edge.bench.record import check_writable, write_record
    from nmoe_edge.bench.tables import record_tables
    from nmoe_edge.bundle.fleet import fleet_file
    from nmoe_edge.errors import BenchError

    if fleet is None and (rate is not None or clients > 1):
        raise click.UsageError("--rate and --clients measure a fleet: give --fleet too")
    if record_file is not None:
        check_writable(record_file)
    signals = _StopSignals()
    fleet = fleet_file(fleet) if fleet is not None else None
    dtypes = tuple(LATENT_TYPES[name] for name in latents)
    plan = Plan(bundle, threads, provider, targets, dtypes, fleet, key, duration, rounds, clients, rate)
    try:
        record = measure(plan, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        click.echo("nmoe-edge: stopped before the first round was complete; nothing to report", err=True)
        sys.exit(signals.exit_status or 1)
    signals.measuring = False
    try:
        if record_file is not None:
            write_record(record_file, record)
    finally:
        click.echo(record_tables(record))
    if signals.exit_status is not None:
        sys.exit(signals.exit_status)
    if record.stopped is not None:
        raise BenchError(record.stopped)


@bench.command(
    epilog="""\b
Verdicts, from the ratio B/A and its 99 % interval:
  worse        the whole interval is above 1, and the ratio above 1.05
  better       the whole interval is below 1, and the ratio below 1/1.05
  same         the whole interval is between 1/1.10 and 1.10
  cannot tell  none of these: use more --rounds, a longer --duration
               or an idle machine

\b
Example: nmoe-edge bench compare before.json after.json
"""
)
@click.argument("old", type=PATH, metavar="A.json")
@click.argument("new", type=PATH, metavar="B.json")
def compare(old: Path, new: Path) -> None:
    """Compare two records of `bench --json`, and exit 1 if B is worse than A beyond the noise.

    Needs five or more rounds in each record. For each row of the tables it compares the p50 of the rounds, and for
    each number of threads the memory. The ratio is the median over every pair of a round of A and a round of B; its
    interval holds the true ratio 99 times in 100. One unchanged row in 250 looks worse by chance: measure it again.

    A peer or a fleet is also worse if its missing, refused or degraded answers rise by more than one point beyond
    chance. Another bundle or machine in B gives a warning. Exits 1 as well if no row has a verdict.
    """
    from nmoe_edge.bench.compare import compare_records
    from nmoe_edge.bench.record import read_record
    from nmoe_edge.bench.tables import comparison_tables
    from nmoe_edge.errors import BenchError

    first, second = read_record(old), read_record(new)
    comparison = compare_records(first, second)
    click.echo(comparison_tables(first, second, comparison))
    if not comparison.times:
        raise BenchError(f"{old} and {new} have no row in common: measure both with the same options")
    if not comparison.has_verdict:
        raise BenchError("no row has five rounds in both records, which a verdict needs: measure with --rounds 5")
    sys.exit(1 if comparison.worse else 0)
