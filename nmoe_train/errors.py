"""Everything that nmoe_train raises on purpose.

TrainError
├── NetError   a network that cannot be built: an unknown name, wrong arguments, no module
└── RunError   a run that cannot be read, or cannot be written here
"""

from __future__ import annotations


class TrainError(Exception):
    """The root: its text is one line that says what to do."""


class NetError(TrainError):
    """A network cannot be built from its specification."""


class RunError(TrainError):
    """A run cannot be read or written."""
