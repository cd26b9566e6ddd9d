"""The examples for boards, as far as they can be checked without one: what they call, copy and configure exists."""

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
SHELL_BLOCKS = [block for text in READMES.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
CONFIGURED = [UNIT.read_text(), JETSON.read_text(), DOCKERFILE]
COMMANDS = [
    found
    for text in (*SHELL_BLOCKS, *CONFIGURED)
    for line in text.replace("\\\n", " ").splitlines()
    if not line.startswith("#")
    for found in re.findall(r"(?:^|[\s/=])(nmoe-(?:edge|export|train) .*)", line)
]
CONTAINER = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[1])


def test_there_are_boards_and_commands_to_check():
    assert set(READMES) == {"docker", "jetson", "raspberry-pi"}
    assert {shlex.split(command)[1] for command in COMMANDS if command.startswith("nmoe-edge")} == {
        *("keygen", "selftest", "serve", "status"),
    }


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_every_fenced_block_of_a_board_is_a_shell_script(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("command", [*COMMANDS, shlex.join(["nmoe-edge", *CONTAINER])])
def test_every_command_line_for_a_board_parses(command):
    program, *arguments = shlex.split(command, comments=True)
    parse(program, arguments)


def test_the_unit_does_what_a_device_understands():
    lines = UNIT.read_text().splitlines()
    for line in (
        *("KillSignal=SIGTERM", "ExecReload=/bin/kill -HUP $MAINPID", "Restart=on-failure", "StateDirectory=nmoe"),
        *("User=nmoe", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="),
    ):
        assert line in lines
    (serve,) = [line for line in lines if line.startswith("ExecStart=")]
    assert "--state /var/lib/nmoe" in serve, "the only folder that it may write"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
@pytest.mark.parametrize("drop_in", [None, JETSON], ids=["pi", "jetson"])
def test_systemd_knows_every_directive_of_the_unit(drop_in, tmp_path):
    # The command is looked for, and is not here: another one stands for it.
    program = shutil.which("true")
    unit = tmp_path / "nmoe@device-00.service"
    unit.write_text(UNIT.read_text().replace("/opt/nmoe/bin/nmoe-edge", program))
    if drop_in is not None:
        (tmp_path / f"{unit.name}.d").mkdir()
        given = drop_in.read_text().replace("/opt/nmoe/bin/nmoe-edge", program)
        (tmp_path / f"{unit.name}.d" / drop_in.name).write_text(given)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if unit.name in line or str(tmp_path) in line]
    assert (done.returncode, said) == (0, [])


def test_the_dockerfile_copies_what_is_there_and_installs_an_extra_that_exists():
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    sources = {name for names in copied for name in names}
    assert all((ROOT / name).exists() for name in sources)
    ignored = (EXAMPLES / "docker" / "Dockerfile.dockerignore").read_text()
    packages = {name for name in sources if name.startswith("nmoe_")}
    assert {f"!{name}" for name in sources - packages} | {"!nmoe_*"} <= set(ignored.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert packages == {path.name for path in ROOT.glob("nmoe_*") if path.is_dir()}
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= sources
    extras = set(re.findall(r"\[([a-z-]+)\]'", DOCKERFILE)) | set(
        re.findall(r"\)\[([a-z-]+)\]\"", "".join(SHELL_BLOCKS))
    )
    assert extras == {"edge", "edge-gpu"}
    assert extras <= set(project["project"]["optional-dependencies"])


def test_the_container_does_not_run_as_root():
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    user = re.search(r"^USER (\S+)$", last_stage, re.M)[1]
    assert user not in ("root", "0")
    assert last_stage.index("USER ") < last_stage.index("ENTRYPOINT ")
