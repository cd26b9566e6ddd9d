"""What every test shares: how hard the fuzz tests try, and where the samples lie."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--fuzz-examples", type=int, default=10_000, help="examples for each fuzz test")
    parser.addoption("--fuzz-random", action="store_true", help="other examples in every run")


def pytest_configure(config):
    repeatable = not config.getoption("--fuzz-random")
    settings.register_profile("default", deadline=None, derandomize=repeatable, database=None)
    settings.register_profile("fuzz", settings.get_profile("default"), max_examples=config.getoption("--fuzz-examples"))
    settings.load_profile("default")


class Shown(NamedTuple):
    """What a command left behind."""

    exit_code: int
    output: str
    error: str


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run an entry point in this process, as if its command had been typed."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Shown(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny_fleet():
    """Three devices whose every answer is known; tests/tiny/make.py says which."""
    return TESTS / "tiny" / "fleet"


@pytest.fixture
def golden():
    """Samples of version 1 of every contract."""
    return TESTS / "golden" / "v1"


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """No test reads or writes what the user's own commands remember."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
