"""Shared by every test: the options of the fuzz tests, and fixtures for sample data and commands."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--fuzz-examples", type=int, default=10_000, help="examples for each fuzz test")
    parser.addoption("--fuzz-random", action="store_true", help="new random examples in every run")


def pytest_configure(config):
    repeatable = not config.getoption("--fuzz-random")
    settings.register_profile("default", deadline=None, derandomize=repeatable, database=None)
    settings.register_profile("fuzz", settings.get_profile("default"), max_examples=config.getoption("--fuzz-examples"))
    settings.load_profile("default")


class Shown(NamedTuple):
    """The result of a command."""

    exit_code: int
    output: str
    error: str


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the main function of a command in this process, with these arguments."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Shown(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny_fleet():
    """The folder of three devices with known answers; see tests/tiny/make.py."""
    return TESTS / "tiny" / "fleet"


@pytest.fixture
def golden():
    """The folder of samples of every format, version 1."""
    return TESTS / "golden" / "v1"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep tests away from the cache of the user's own commands."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
