"""The examples for boards, without a board: the commands, files and settings that they name exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
from test_docs import ROOT, parse

from nmoe_edge.bundle.fleet import tomllib

EXAMPLES = ROOT / "examples"
UNIT = EXAMPLES / "raspberry-pi" / "nmoe@.service"
JETSON = EXAMPLES / "jetson" / "jetson.conf"
DOCKERFILE = (EXAMPLES / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
READMES = {path.parent.name: path.read_text() for path in EXAMPLES.glob("*/README.md")}
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", "\n".join(READMES.values()), re.S)
SHELL_TEXT = "\n".join([*SHELL_BLOCKS, UNIT.read_text(), JETSON.read_text(), DOCKERFILE]).replace("\\\n", " ")
COMMANDS = re.findall(r"^(?!#)(?:.*[\s/=])??(nmoe-(?:edge|export|train) .*)", SHELL_TEXT, re.M)
CONTAINER_COMMAND = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[1])


def test_the_board_readmes_show_the_commands_of_a_device():
    assert set(READMES) == {"docker", "jetson", "raspberry-pi"}
    subcommands = {shlex.split(command)[1] for command in COMMANDS if command.startswith("nmoe-edge")}
    assert subcommands == {"keygen", "selftest", "serve", "status"}


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_every_shell_block_for_a_board_is_valid_bash(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", [*COMMANDS, shlex.join(["nmoe-edge", *CONTAINER_COMMAND])])
def test_every_command_line_for_a_board_parses(command):
    program, *arguments = shlex.split(command, comments=True)
    parse(program, arguments)


def test_the_unit_stops_reloads_and_confines_a_device():
    lines = UNIT.read_text().splitlines()
    for line in (
        *("KillSignal=SIGTERM", "ExecReload=/bin/kill -HUP $MAINPID", "Restart=on-failure", "StateDirectory=nmoe"),
        *("User=nmoe", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="),
    ):
        assert line in lines
    (serve,) = [line for line in lines if line.startswith("ExecStart=")]
    assert "--state /var/lib/nmoe" in serve, "the only folder that the unit may write"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
@pytest.mark.parametrize("drop_in", [None, JETSON], ids=["pi", "jetson"])
def test_systemd_knows_every_directive_of_the_unit(drop_in, tmp_path):
    # systemd-analyze checks that the command exists, so a program of this machine stands in for it.
    program = shutil.which("true")
    unit = tmp_path / "nmoe@device-00.service"
    unit.write_text(UNIT.read_text().replace("/opt/nmoe/bin/nmoe-edge", program))
    if drop_in is not None:
        (tmp_path / f"{unit.name}.d").mkdir()
        text = drop_in.read_text().replace("/opt/nmoe/bin/nmoe-edge", program)
        (tmp_path / f"{unit.name}.d" / drop_in.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    warnings = [line for line in done.stderr.splitlines() if unit.name in line or str(tmp_path) in line]
    assert (done.returncode, warnings) == (0, [])


def test_the_dockerfile_copies_existing_files_and_installs_an_existing_extra():
    sources = set(" ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)).split())
    assert all((ROOT / name).exists() for name in sources)
    ignored = (EXAMPLES / "docker" / "Dockerfile.dockerignore").read_text()
    packages = {name for name in sources if name.startswith("nmoe_")}
    assert {f"!{name}" for name in sources - packages} | {"!nmoe_*"} <= set(ignored.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert packages == {path.name for path in ROOT.glob("nmoe_*") if path.is_dir()}
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= sources
    extras = set(re.findall(r"\[([a-z-]+)\]'", DOCKERFILE))
    extras |= set(re.findall(r"\)\[([a-z-]+)\]\"", "".join(SHELL_BLOCKS)))
    assert extras == {"edge", "edge-gpu"}
    assert extras <= set(project["project"]["optional-dependencies"])


def test_the_container_does_not_run_as_root():
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    user = re.search(r"^USER (\S+)$", last_stage, re.M)[1]
    assert user not in ("root", "0")
    assert last_stage.index("USER ") < last_stage.index("ENTRYPOINT ")
