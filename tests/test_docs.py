"""Every command, flag, make target and file that a document names exists."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nmoe_edge.cli import cli as nmoe_edge
from nmoe_export.cli import cli as nmoe_export
from nmoe_train.cli import cli as nmoe_train

ROOT = Path(__file__).parents[1]
PROGRAMS = {"nmoe-edge": nmoe_edge, "nmoe-export": nmoe_export, "nmoe-train": nmoe_train}
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("nmoe_*/**/*.md"), *ROOT.glob("examples/**/*.md")]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
SHELL_LINES = [line for line in "\n".join(SHELL_BLOCKS).splitlines() if line and not line.startswith("#")]


def parse(program, arguments):
    """Parse a command line as its program would, without running it; click's UsageError if it is wrong."""
    command = PROGRAMS[program]
    context = click.Context(command)
    while isinstance(command, click.Group) and not arguments[0].startswith("-"):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
    # --help and --version would end the parse.
    command.make_context(program, [a for a in arguments if a not in ("--help", "--version")], resilient_parsing=False)


def commands(group):
    """A program and all of its commands."""
    if not isinstance(group, click.Group):
        return [group]
    return [group, *itertools.chain.from_iterable(commands(member) for member in group.commands.values())]


def test_the_readme_shows_commands():
    assert {shlex.split(line, comments=True)[0] for line in SHELL_LINES} >= {"make", *PROGRAMS}


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_every_shell_block_of_the_readme_is_valid_bash(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line.startswith("nmoe-")])
def test_every_command_line_of_the_readme_parses(line):
    program, *arguments = shlex.split(line, comments=True)
    parse(program, arguments)


def test_parse_rejects_a_wrong_flag_and_a_wrong_command():
    with pytest.raises(click.UsageError):
        parse("nmoe-edge", ["inspect", "fleet", "--jsn"])
    with pytest.raises(click.UsageError):
        parse("nmoe-edge", ["inspct", "fleet"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_a_document_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    text = document.read_text()
    named = set(" ".join(re.findall(r"`make ([a-z -]+)`", text)).split())
    named |= set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_in_a_document_exists(document):
    text = document.read_text()
    for program, command in re.findall(r"`(nmoe-(?:edge|export|train)) ([a-z]+)", text):
        group = PROGRAMS[program]
        assert isinstance(group, click.Group), f"{program} has no command {command}"
        assert command in group.commands, f"{program} {command}"
    options = {"--help"}
    for command in itertools.chain.from_iterable(map(commands, PROGRAMS.values())):
        for parameter in command.params:
            options.update(parameter.opts)
    # Only in lines that name our programs: other lines may have flags of pip or git.
    lines = [line for line in text.splitlines() if re.search("nmoe-(edge|export|train)", line)]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(lines))) <= options


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_has_help(program):
    for command in commands(PROGRAMS[program]):
        assert command.help, command.name
        assert isinstance(command, click.Group) or "Example" in (command.epilog or ""), command.name
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (command.name, parameter.name)


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M))
    assert set(re.findall(r"^make ([a-z-]+)", shown, re.M)) == targets


@pytest.mark.parametrize("script", re.findall(r"python (tests/\S+\.py)", MAKEFILE))
def test_every_script_of_the_makefile_can_be_imported(script):
    path = ROOT / script
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); import {path.stem}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_path_in_the_makefile_exists():
    for path in re.findall(r"\b(?:tests|examples)/\S+", MAKEFILE):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", README, re.M)
