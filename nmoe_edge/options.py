"""Command-line options that several commands of nmoe-edge share, so that their flags and help texts agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
LATENT_TYPES = {"int8": "int8", "fp16": "float16", "fp32": "float32"}
"""What a user types for --latents -> the dtype that bundles and messages name."""


def number(
    flag: str, kind: click.IntRange | click.FloatRange, *, default: float, metavar: str, text: str
) -> Callable[..., Any]:
    """An option that takes a number; its help shows `text`, the default and the range."""
    return click.option(flag, type=kind, default=default, show_default=True, metavar=metavar, help=text)


def deadline(text: str) -> Callable[..., Any]:
    """The option --deadline-ms."""
    return number("--deadline-ms", click.FloatRange(1, 3_600_000), default=1000, metavar="MS", text=text)


THREADS = click.IntRange(1, 256)
threads = number("--threads", THREADS, default=1, metavar="N", text="CPU threads per graph.")
provider = click.option(
    "--provider",
    type=click.Choice(("auto", "cpu", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="What runs the models; auto takes the first available of tensorrt, cuda and cpu.",
)
own_key = click.option(
    "--key",
    type=PATH,
    help="This device's key file.  [default: NAME.key next to fleet.toml, or in FLEET-keys next to its folder]",
)


def target(*, required: bool = False) -> Callable[..., Any]:
    """The option --at, which names the device to ask."""
    return click.option(
        "--at",
        "target",
        required=required,
        metavar="DEVICE",
        help="The device to ask: tcp://HOST:PORT or, with --fleet, its name.",
    )


def access(command: Any) -> Any:
    """Add --fleet and --key: how a client finds the address and the key of the device it asks."""
    command = click.option(
        "--key",
        type=PATH,
        help="Key file of any device of the fleet; the client asks with its key."
        "  [default: the first found next to fleet.toml, or in FLEET-keys next to its folder]",
    )(command)
    return click.option(
        "--fleet",
        type=PATH,
        help="fleet.toml or its folder: needed for names, and for a fleet with keys.",
    )(command)
