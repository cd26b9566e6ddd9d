"""Import an object by its path, as `--modules` and a network's factory name it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_path(path: str) -> Any:
    """The object that `package.module:name` names, from an installed package or from the current folder.

    Whatever the module raises while it is imported comes through.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # an installed command does not search the current folder; python does
    return getattr(importlib.import_module(module), name)
