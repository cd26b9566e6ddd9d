"""Runs a command-line program and turns its errors into exit statuses.

An expected error becomes one clear line on stderr; a bug keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Collection

import click

from nmoe_edge.common.text import one_line

SETTINGS = {"help_option_names": ["-h", "--help"]}
EXIT_STATUS = "Exit status: 0 success; 1 failure, with the reason printed; 2 wrong command line."


def run_program(
    command: click.Command, name: str, errors: type[Exception], extra: str, packages: Collection[str]
) -> None:
    """Run `command` under the program name `name`, then exit.

    errors: the root of the package's error tree; each error is printed as one line, with exit status 1.
    extra, packages: when one of `packages` is not installed, the line says to install nmoe[`extra`].
    Every other exception is a bug and passes through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prints "?" for a character that the terminal cannot show
    try:
        try:
            command(prog_name=name)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE) or error.filename is not None:
            raise
        # Redirect stdout to /dev/null, or the interpreter fails again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:  # a closed pipe (EPIPE) needs no message: the reader closed it
            click.echo(f"{name}: cannot write to stdout: {error.strerror}", err=True)
    except errors as error:
        click.echo(f"{name}: {one_line(str(error))}", err=True)
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        click.echo(f"{name}: {error.name} is not installed; pip install 'nmoe[{extra}]'", err=True)
    sys.exit(1)
