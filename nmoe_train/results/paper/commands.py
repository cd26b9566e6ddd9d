"""`nmoe-train table` and `nmoe-train figure`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmoe_train import options
from nmoe_train.errors import ConfigError, RunError
from nmoe_train.terminal import Progress

if TYPE_CHECKING:
    from nmoe_train.results.paper.figures import Drawing
    from nmoe_train.results.paper.folder import Done, Plan
    from nmoe_train.results.paper.units import Unit


@click.command(
    short_help="Print the paper's table 1 or 2, ours beside theirs.",
    epilog="""\b
Examples: nmoe-train table 1
          nmoe-train table 2 --seeds 3 --format latex
          nmoe-train table 1 --partitions dirichlet:0.3,classes:2
          nmoe-train table 1 --data cifar10 --backbone resnet18 --device cuda --minutes 10""",
)
@click.argument("number", type=click.IntRange(1, 2))
@click.option(
    "--format",
    "shown",
    type=click.Choice(("text", "csv", "latex")),
    default="text",
    show_default=True,
    help="What to print; all three are written to --out.",
)
@click.option(
    "--rivals",
    is_flag=True,
    help="Also train methods that the paper does not have: FedAvg fine-tuned, FedRep, Ditto, …",
)
@options.PAPER
def table(number: int, shown: str, rivals: bool, partitions: str | None, seeds: int, **given: Any) -> None:
    """Print the paper's table 1 or 2 with figures trained here and, beside them, the paper's: every extractor with
    every gate, and the baselines.

    Table 1 is measured on each client's own distribution, table 2 on balanced rows, as many for each client. Numbers
    are percentages: the mean of the seeds and their standard deviation. Lines below the table say where the order of
    the methods differs from the paper's.

    On digits this takes minutes. Both tables use the same trainings, which are kept in --out: finished ones are not
    repeated, and the same command resumes a stopped one. table-1.txt, .csv and .tex (LaTeX with booktabs) are written
    there too.
    """
    from nmoe_train.results.paper.cells import table_of
    from nmoe_train.results.paper.tables import FORMATS, SUFFIXES
    from nmoe_train.results.paper.units import PARTITIONS, table_units

    splits = _split_names(partitions, PARTITIONS[number])
    plan = _plan(given)
    done, unfinished = _do_units(plan, table_units(splits, seeds, rivals), given)
    found = table_of(number, done, splits, seeds)
    for name, suffix in SUFFIXES.items():
        text = FORMATS[name](found)
        _write(plan.out / f"table-{number}.{suffix}", text if text.endswith("\n") else f"{text}\n")
    click.echo(FORMATS[shown](found).rstrip("\n"))
    if unfinished:
        click.echo(unfinished, err=shown != "text")


@click.command(
    short_help="Draw the paper's figure 3, 4a or 4b, or learning curves.",
    epilog="""\b
Examples: nmoe-train figure 3
          nmoe-train figure 4a --seeds 3 --clients 5,10,20
          nmoe-train figure 4b --partitions noniid:0.2
          nmoe-train figure curves""",
)
@click.argument("name", type=click.Choice(("3", "4a", "4b", "curves")))
@click.option("--clients", metavar="N,N,…", help="Figure 4a: numbers of clients.  [default: 5,10,20,40]")
@options.PAPER
def figure(name: str, clients: str | None, partitions: str | None, seeds: int, **given: Any) -> None:
    """Draw a figure of the paper from trainings made here, as an HTML page, a PDF and a PNG in --out.

    3: which device asks which expert, for FedSC, the centralised mixture and local classifiers. 4a: accuracy when one
    data set is split among more and more clients. 4b: accuracy against the number of experts that a row is sent to.
    curves: how FedCE, FedSC and FedGate learn.

    Figures 3, 4b and curves use the trainings of the tables. Figure 4a needs more, one for each number of clients.
    """
    from nmoe_train.results.paper.figures import page_of

    plan = _plan(given)
    drawing, unfinished = _FIGURES[name](plan, partitions, clients, seeds, given)
    if drawing is None:
        click.echo(unfinished)
        return
    page = plan.out / f"{drawing.name}.html"
    _write(page, page_of(drawing))
    click.echo(f"wrote {page}")

    from nmoe_train.results.paper.plots import save

    for path in save(drawing, plan.out):
        click.echo(f"wrote {path}")


Drawn = tuple["Drawing | None", str]
"""The figure, or None and a line on what is not done yet."""


def _figure_3(plan: Plan, partitions: str | None, clients: str | None, seeds: int, given: dict[str, Any]) -> Drawn:
    from nmoe_train.results.paper import figures, units

    splits = _split_names(partitions, [units.FIGURE_3_PARTITION])
    _refuse(clients is not None, "--clients belongs to figure 4a")
    _refuse(len(splits) > 1 or seeds > 1, "figure 3 shows one split and one seed; name one in --partitions")
    done, unfinished = _do_units(plan, units.figure_3_units(splits[0]), given)
    return (None if unfinished else figures.figure_3(done, splits[0])), unfinished


def _figure_4a(plan: Plan, partitions: str | None, clients: str | None, seeds: int, given: dict[str, Any]) -> Drawn:
    from nmoe_train.results.paper import figures, units
    from nmoe_train.results.paper.work import split_sizes

    counts = _counts(clients) if clients is not None else units.CLIENTS
    sizes = split_sizes(plan, _split_names(partitions, units.PARTITIONS[2]), counts)
    done, unfinished = _do_units(plan, units.split_units(sizes, seeds), given)
    return (None if unfinished else figures.figure_4a(done, sizes, seeds)), unfinished


def _figure_4b(plan: Plan, partitions: str | None, clients: str | None, seeds: int, given: dict[str, Any]) -> Drawn:
    from nmoe_train.results.paper import figures, units

    splits = _split_names(partitions, units.PARTITIONS[2])
    _refuse(clients is not None, "--clients belongs to figure 4a")
    count = plan.data.clients
    done, unfinished = _do_units(plan, units.top_k_units(splits, seeds, count), given)
    return (None if unfinished else figures.figure_4b(done, splits, seeds, count)), unfinished


def _curves(plan: Plan, partitions: str | None, clients: str | None, seeds: int, given: dict[str, Any]) -> Drawn:
    from nmoe_train.results.paper import figures, units
    from nmoe_train.run import read_run

    splits = _split_names(partitions, units.PARTITIONS[1])
    _refuse(clients is not None, "--clients belongs to figure 4a")
    _refuse(seeds > 1, "learning curves show seed 0; leave --seeds out")
    wanted = units.curve_units(splits)
    _, unfinished = _do_units(plan, wanted, given)
    if unfinished:
        return None, unfinished
    runs = {(unit.partition, unit.extractor): read_run(plan.out / unit.name) for unit in wanted}
    return figures.learning_curves({key: run.metrics["history"] for key, run in runs.items()}), ""


_FIGURES = {"3": _figure_3, "4a": _figure_4a, "4b": _figure_4b, "curves": _curves}


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise ConfigError(reason)


def _split_names(text: str | None, usual: Sequence[str]) -> list[str]:
    """The splits of --partitions, each once. ConfigError for an empty list; `work` refuses unknown ones."""
    if text is None:
        return list(usual)
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    _refuse(not names, f"--partitions is {text!r}; name at least one split, for example noniid:0.2")
    return names


def _counts(text: str) -> list[int]:
    """The numbers of --clients, ascending, each once."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and 2 <= int(part) <= 1024)]
    _refuse(bool(wrong), f"--clients is {text!r}; expected numbers in 2..1024 separated by commas, such as 5,10,20")
    return sorted({int(part) for part in parts})


def _plan(given: dict[str, Any]) -> Plan:
    from nmoe_train.results.paper.folder import Plan

    flags = options.settings_of({key: given[key] for key in ("data", "backbone", "device")}, given["settings"])
    data = given["data"] or "digits"
    out = given["out"] or Path("paper") / Path(data.rpartition(":")[2]).stem
    return Plan(out, given["recipe"], flags)


def _do_units(plan: Plan, wanted: Sequence[Unit], given: dict[str, Any]) -> tuple[Done, str]:
    """Work for --minutes; all finished units, and a line on how many of the wanted ones are not finished."""
    from nmoe_train.results.paper.folder import read
    from nmoe_train.results.paper.work import work

    again = "run the same command again to continue"
    try:
        done = (
            read(plan, None)
            if given["no_train"]
            else work(plan, wanted, Progress(), given["minutes"], lambda line: click.echo(line, err=True))
        )
    except KeyboardInterrupt:
        raise RunError(f"stopped; finished parts are saved in {plan.path}; {again}") from None
    count = sum(unit.name in done for unit in wanted)
    if count == len(wanted):
        return done, ""
    again = "run the command without --no-train to continue" if given["no_train"] else again
    return done, f"{count} of {len(wanted)} parts are done and saved in {plan.path}; {again}"


def _write(path: Path, text: str) -> None:
    from nmoe_edge.common.files import replace_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
