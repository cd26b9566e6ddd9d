"""The options of nmoe-train's commands, and the settings that they stand for. Importing this loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


def combine(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, shown in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change any setting, as --set gate.rate=0.1; repeatable. `nmoe-train settings` lists them all.",
)
DEVICE = click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    help="Where the extractor is trained and run; auto takes a GPU when there is one.  [default: auto]",
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print every round and the result as JSON, one object per line."
)
RESUME = click.option("--resume", is_flag=True, help="Finish the training that stopped at --out.")
RUN = click.argument("folder", type=PATH, metavar="RUN")
_RECIPES = "best (the defaults), paper (as published) or apart (each device knows two classes)."


def gate(default: str) -> Callable[..., Any]:
    return click.option(
        "--gate",
        type=click.Choice(("rangate", "rollgate", "fedgate", "statgate")),
        help="How the gate picks experts: rangate (at random, without training), rollgate (trained by one client after"
        " another, to tell which client a row is from), fedgate (trained by all clients, to pick the expert that"
        " answers best) or statgate (assembled from what each client publishes once about its latents, without"
        f" training).  [default: {default}]",
    )


def top_k(default: str) -> Callable[..., Any]:
    return click.option("--top-k", type=int, help=f"Experts that the gate sends a row to.  [default: {default}]")


def extractor(method: str, backbone: str, rounds: str, epsilon: str) -> Callable[..., Any]:
    return combine(
        click.option(
            "--extractor",
            type=click.Choice(("fedce", "fedsc")),
            help="How the extractor is trained: fedce (as part of a classifier, with labels) or fedsc (without labels:"
            f" self-supervised).  [default: {method}]",
        ),
        click.option(
            "--backbone",
            help=f"The extractor: small, resnet9, resnet18 or a.module:factory.  [default: {backbone}]",
        ),
        click.option("--rounds", type=int, help=f"Training rounds of the extractor.  [default: {rounds}]"),
        click.option(
            "--dp-epsilon",
            type=float,
            help="With fedsc: privacy budget ε of the matrices that clients share; it sets their noise, and a smaller"
            f" budget protects better.  [default: {epsilon}]",
        ),
    )


_SETTING_OF_OPTION = {
    "data": "data.name",
    "clients": "data.clients",
    "partition": "data.partition",
    "extractor": "extractor.method",
    "backbone": "extractor.backbone",
    "rounds": "extractor.rounds",
    "dp_epsilon": "fedsc.epsilon",
    "gate": "gate.method",
    "top_k": "inference.top_k",
}
"""Options that are named differently from their setting."""

TRAINING = combine(
    click.option(
        "--config", "file", type=PATH, help="A TOML file of settings, or a run.json to take all settings from."
    ),
    click.option(
        "--recipe", type=click.Choice(("best", "paper", "apart")), help=f"Named settings: {_RECIPES}  [default: best]"
    ),
    click.option(
        "--data",
        help="digits (comes with scikit-learn); a data set of torchvision (downloaded), such as cifar10, cifar100 or"
        " mnist; npz:FILE (your own, or MedMNIST's) or folder:DIR.  [default: digits]",
    ),
    click.option("--clients", type=int, help="Number of clients; each becomes a device.  [default: 10]"),
    click.option(
        "--partition",
        help="Which classes a client has: iid (all alike), noniid:TAU (a share of 1/(1+TAU) from its own class),"
        " dirichlet:A or classes:C.  [default: noniid:0.2]",
    ),
    extractor("fedce", "small", "20 on digits with fedce", "no noise"),
    gate("statgate; fedgate with --recipe paper"),
    top_k("1"),
    click.option("--seed", type=int, help="Seed of all randomness; the same seed gives the same run.  [default: 0]"),
    click.option("--threads", type=int, help="CPU threads; their number affects the last digits.  [default: 1]"),
    DEVICE,
    SET,
)


PAPER = combine(
    click.option(
        "--partitions",
        metavar="P,P,…",
        help="Splits, separated by commas, such as noniid:0.2,dirichlet:0.3,classes:2.  [default: the paper's]",
    ),
    click.option(
        "--seeds",
        type=click.IntRange(1, 100),
        default=1,
        show_default=True,
        help="Trainings per number; what is shown is their mean.",
    ),
    click.option(
        "--data", help="digits, a data set of torchvision such as cifar10, npz:FILE or folder:DIR.  [default: digits]"
    ),
    click.option(
        "--recipe",
        type=click.Choice(("best", "paper")),
        default="paper",
        show_default=True,
        help=f"Named settings: {_RECIPES}",
    ),
    click.option("--backbone", help="The extractor: small, resnet9, resnet18 or a.module:factory.  [default: small]"),
    DEVICE,
    SET,
    click.option(
        "--minutes", type=float, help="Stop after this time; the same command continues.  [default: no limit]"
    ),
    click.option("--no-train", is_flag=True, help="Train nothing: show what the folder holds."),
    click.option("--out", type=PATH, help="The folder for the runs and paper.json.  [default: paper/DATA]"),
)


def settings_of(given: Mapping[str, object], settings: Sequence[str] = ()) -> dict[str, Any]:
    """The given options as settings nested by section; options win over --set."""
    from nmoe_train.settings import parse_setting

    values = [parse_setting(text) for text in settings]
    values += [(_SETTING_OF_OPTION.get(option, option), value) for option, value in given.items()]
    flags: dict[str, Any] = {}
    for setting, value in values:
        if value is not None:
            *sections, name = setting.split(".")
            table = flags
            for section in sections:
                table = table.setdefault(section, {})
            table[name] = value
    return flags
