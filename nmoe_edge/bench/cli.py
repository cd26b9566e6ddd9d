"""`nmoe-edge bench`: measure a bundle on this device, and compare two measurements."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from nmoe_edge.common.command import SETTINGS
from nmoe_edge.common.schema import nearest
from nmoe_edge.common.text import one_line

_LATENTS = {"int8": "int8", "fp16": "float16", "fp32": "float32"}


class _DefaultGroup(click.Group):
    """What is not one of its commands is the first argument of `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._named(args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            return args
        hint = nearest(args[0], self.commands) if args else ""
        if hint and not os.path.lexists(args[0]):
            raise click.UsageError(f"{one_line(args[0])!r} is no bundle here, and no command{hint}")
        return ["run", *args]


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in click 8.5 alone
    """Words between commas, each of them once."""

    name = "list"

    def __init__(self, kind: Any, due: str) -> None:
        self.kind, self.due = kind, due

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = []
        for word in value.split(","):
            try:
                found.append(self.kind.convert(word.strip(), param, ctx))
            except click.BadParameter:
                self.fail(f"{word!r}: {self.due} are due, with commas between them", param, ctx)
        return tuple(dict.fromkeys(found))


@click.group(cls=_DefaultGroup, context_settings=SETTINGS)
def bench() -> None:
    """Measure latency and memory of a BUNDLE on this device; `bench compare` puts two measurements side by side."""


@bench.command(
    epilog="""\b
Commands:
  run      This one; the word may be left out.
  compare  Two records that --json has kept, side by side.

\b
Examples: nmoe-edge bench bundles/digits/device-00 --threads 1,2,4 --json before.json
          nmoe-edge bench device-00 --at tcp://192.0.2.7:7101 --fleet fleet.toml --rate 50
          nmoe-edge bench compare before.json after.json
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--threads",
    type=_List(click.IntRange(1, 256), "numbers from 1 to 256"),
    default="1",
    show_default=True,
    help="CPU threads a graph.",
)
@click.option(
    "--provider",
    type=click.Choice(("auto", "cpu", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="What runs the models.",
)
@click.option(
    "--at", metavar="DEVICE", multiple=True, help="A peer to measure: tcp://HOST:PORT, or its name; may be given again."
)
@click.option(
    "--latents",
    "--precision",
    type=_List(click.Choice(tuple(_LATENTS)), f"words of {', '.join(_LATENTS)}"),
    default="int8,fp16,fp32",
    show_default=True,
    help="On the wire to a peer.",
)
@click.option("--fleet", type=click.Path(path_type=Path), help="Measure the whole path among the devices of this file.")
@click.option("--key", type=click.Path(path_type=Path), help="This device's key file.  [default: see keygen]")
@click.option(
    "--duration",
    type=click.FloatRange(0.1, 3600),
    default=10,
    show_default=True,
    help="Seconds for the graphs, with each number of threads; and for each row over the wire.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 30),
    default=5,
    show_default=True,
    help="That the time is divided into; to compare, five in each record are enough.",
)
@click.option(
    "--clients", type=click.IntRange(1, 256), default=1, show_default=True, help="That ask the fleet at a time."
)
@click.option("--rate", type=click.FloatRange(0.01, 1e5), help="Also ask the fleet so often a second, by chance.")
@click.option("--json", "record_file", type=click.Path(path_type=Path), help="Keep every sample in this file.")
def run(
    bundle: Path,
    threads: tuple[int, ...],
    provider: str,
    at: tuple[str, ...],
    latents: tuple[str, ...],
    fleet: Path | None,
    key: Path | None,
    duration: float,
    rounds: int,
    clients: int,
    rate: float | None,
    record_file: Path | None,
) -> None:
    """Measure what BUNDLE takes here, time and memory; with --at a peer's expert, with --fleet the fleet.

    Inputs are those of the bundle's self-test. Every number of threads has a fresh process in every round. The device
    of this bundle is asked where it serves already, and learns from that if it adapts; else it is served meanwhile,
    with the first number of threads. Ctrl-C, SIGTERM and SIGHUP end it early, with the rounds that were whole by then.
    """
    import signal
    from types import FrameType

    from nmoe_edge.bench.measure import Plan, measure
    from nmoe_edge.bench.record import check_writable, write_record
    from nmoe_edge.bench.tables import record_tables
    from nmoe_edge.bundle.fleet import fleet_file
    from nmoe_edge.errors import BenchError

    if fleet is None and (rate is not None or clients > 1):
        raise click.UsageError("--rate and --clients are for a fleet: give --fleet too")
    if record_file is not None:
        check_writable(record_file)
    signalled: list[int] = []
    measuring = True

    def stop(which: int, _frame: FrameType | None) -> None:
        """End the measuring, once: what was started is ended, what was found is kept, and neither is cut short."""
        signalled.append(which)
        if measuring and len(signalled) == 1:
            raise KeyboardInterrupt

    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(which) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(which, stop)
    fleet = fleet_file(fleet) if fleet is not None else None
    types = tuple(_LATENTS[name] for name in latents)
    plan = Plan(bundle, threads, provider, at, types, fleet, key, duration, rounds, clients, rate)
    try:
        record = measure(plan, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        click.echo("nmoe-edge: stopped before a round was whole; nothing is kept", err=True)
        sys.exit(128 + signalled[0])
    measuring = False
    try:
        if record_file is not None:
            write_record(record_file, record)
    finally:
        click.echo(record_tables(record))
    if signalled:
        sys.exit(128 + signalled[0])
    if record.stopped is not None:
        raise BenchError(record.stopped)


@bench.command(
    epilog="""\b
Verdicts:
  worse         all of the interval is over 1, and the ratio over 1.05
  better        all of it is under 1, and the ratio under 1/1.05
  same          all of it lies between 1/1.10 and 1.10
  cannot tell   it is wider: take more --rounds, a longer --duration, an idle machine

\b
Example: nmoe-edge bench compare before.json after.json
"""
)
@click.argument("old", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("new", type=click.Path(path_type=Path), metavar="B.json")
def compare(old: Path, new: Path) -> None:
    """Compare two records that --json has kept; exit 1 when B is worse than A beyond their noise.

    The medians of rounds are compared by their ranks, which takes five rounds in each record: of every pair of rounds
    the ratio, and an interval that holds the truth 99 times in a hundred. So is memory. One in 250 that have not
    changed looks worse by chance: measure that one again.

    A fleet or a peer is worse also where more of its answers were missing, refused or degraded. Another bundle or
    another machine is a warning. Where no row has a verdict, that is exit 1 too.
    """
    from nmoe_edge.bench.compare import compared
    from nmoe_edge.bench.record import read_record
    from nmoe_edge.bench.tables import comparison_tables
    from nmoe_edge.errors import BenchError

    first, second = read_record(old), read_record(new)
    comparison = compared(first, second)
    click.echo(comparison_tables(first, second, comparison))
    if not comparison.times:
        raise BenchError(f"{old} and {new} have no row in common: measure both with the same options")
    if not comparison.told:
        raise BenchError("no row has the five rounds in both that a verdict needs: measure again with --rounds 5")
    sys.exit(1 if comparison.worse else 0)
