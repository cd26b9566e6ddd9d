"""What the documents promise exists: every command, flag, target and file that they name."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from nmoe_edge.cli import cli as nmoe_edge
from nmoe_export.cli import cli as nmoe_export
from nmoe_train.cli import cli as nmoe_train

ROOT = Path(__file__).parents[1]
PROGRAMS = {"nmoe-edge": nmoe_edge, "nmoe-export": nmoe_export, "nmoe-train": nmoe_train}
DOCUMENTS = [*ROOT.glob("*.md"), *(path for part in ("nmoe_*", "examples") for path in ROOT.glob(f"{part}/**/*.md"))]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
SHELL_LINES = [line for block in SHELL_BLOCKS for line in block.splitlines() if line and not line.startswith("#")]


def parse(program, arguments):
    """Parse a command line as its program would, and run nothing; click's UsageError when it cannot be."""
    command, context = PROGRAMS[program], click.Context(PROGRAMS[program])
    while isinstance(command, click.Group) and not arguments[0].startswith("-"):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
    # Asking for help ends a parse; here it only has to be known.
    command.make_context(program, [a for a in arguments if a not in ("--help", "--version")], resilient_parsing=False)


def commands(group):
    """Every command of a program, itself among them."""
    inside = group.commands.values() if isinstance(group, click.Group) else ()
    return [group, *(command for member in inside for command in commands(member))]


def test_the_readme_shows_commands():
    assert {shlex.split(line, comments=True)[0] for line in SHELL_LINES} >= {"make", *PROGRAMS}


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_every_fenced_block_is_a_shell_script(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line.startswith("nmoe-")])
def test_every_command_line_of_the_readme_parses(line):
    program, *arguments = shlex.split(line, comments=True)
    parse(program, arguments)


def test_a_command_line_with_a_wrong_flag_would_not_parse():
    with pytest.raises(click.UsageError):
        parse("nmoe-edge", ["inspect", "fleet", "--jsn"])
    with pytest.raises(click.UsageError):
        parse("nmoe-edge", ["inspct", "fleet"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_that_is_named_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    text = document.read_text()
    named = {t for quoted in re.findall(r"`make ([a-z -]+)`", text) for t in quoted.split()}
    named |= set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_that_is_named_exists(document):
    text = document.read_text()
    for program, command in re.findall(r"`(nmoe-(?:edge|export|train)) ([a-z]+)", text):
        group = PROGRAMS[program]
        assert isinstance(group, click.Group), f"{program} has no command {command}"
        assert command in group.commands, f"{program} {command}"
    options = {
        option
        for group in PROGRAMS.values()
        for command in commands(group)
        for parameter in command.params
        for option in parameter.opts
    } | {"--help"}
    # Of the lines that speak of our programs: pip's and git's flags are their own.
    lines = [line for line in text.splitlines() if re.search("nmoe-(edge|export|train)", line)]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(lines))) <= options


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_explains_itself(program):
    for command in commands(PROGRAMS[program]):
        assert command.help, command.name
        assert isinstance(command, click.Group) or "Example" in (command.epilog or ""), command.name
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (command.name, parameter.name)


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M))
    assert set(re.findall(r"^make ([a-z-]+)", shown, re.M)) == targets


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", README, re.M)
