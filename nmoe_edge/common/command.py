"""How a command of ours ends: well, with one line that says what to do, or with the traceback of a bug."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Collection

import click

from nmoe_edge.common.text import one_line

SETTINGS = {"help_option_names": ["-h", "--help"]}
EXIT_STATUS = "Exit status: 0 all is well; 1 it is not, and one line says why; 2 the command was misspelt."


def run_program(
    command: click.Command, name: str, errors: type[Exception], extra: str, brings: Collection[str]
) -> None:
    """Run `command` and exit; `brings` are the packages that are missing when the extra `extra` is.

    Only `errors`, the root of a package's error tree, and a missing extra are translated: anything else is a bug.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no arrows is shown something else
    try:
        try:
            command(prog_name=name)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would fail at it once more
        if error.errno == errno.ENOSPC:  # whoever closed the pipe knows
            click.echo(f"{name}: what it prints cannot be written: {error.strerror}", err=True)
    except errors as error:
        click.echo(f"{name}: {one_line(str(error))}", err=True)
    except ModuleNotFoundError as error:
        if error.name not in brings:
            raise
        click.echo(f"{name}: {error.name} is not installed; pip install 'nmoe[{extra}]'", err=True)
    sys.exit(1)
