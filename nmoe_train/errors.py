"""Every error that nmoe_train raises on purpose.

TrainError
├── ConfigError    a setting is unknown, or its value is impossible
├── DataError      data is missing, malformed, or cannot be split as asked
├── NetError       a network cannot be built: unknown name, wrong arguments, missing module
├── DivergedError  a loss or a weight became infinite or NaN
└── RunError       a run cannot be read, written or resumed

Any other exception is a bug.
"""

from __future__ import annotations


class TrainError(Exception):
    """The root of the tree. Its text is one line: what is wrong, and what to do."""


class ConfigError(TrainError):
    """A setting is unknown or its value is impossible."""


class DataError(TrainError):
    """Data is missing, malformed or too little for the split."""


class NetError(TrainError):
    """A network cannot be built from its specification."""


class DivergedError(TrainError):
    """A loss or a weight became infinite or NaN; the checkpoint of the last good round is kept."""


class RunError(TrainError):
    """A run cannot be read, written or resumed."""
