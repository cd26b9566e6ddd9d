"""Imports an object by its path, for `--modules` and the factory of a network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_path(path: str) -> Any:
    """Import `name` from `package.module:name`, from the installed packages or the current folder.

    Exceptions raised while importing the module pass through.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # an installed command does not search the current folder; python does
    return getattr(importlib.import_module(module), name)
