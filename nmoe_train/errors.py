"""Everything that nmoe_train raises on purpose.

TrainError
├── ConfigError    a setting that is unknown, or cannot be
├── DataError      data that is not to be had, or cannot be split so
├── NetError       a network that cannot be built: an unknown name, wrong arguments, no module
├── DivergedError  a loss that is no number any more
└── RunError       a run that cannot be read, written or resumed
"""

from __future__ import annotations


class TrainError(Exception):
    """The root: its text is one line that says what to do."""


class ConfigError(TrainError):
    """A setting is unknown or impossible."""


class DataError(TrainError):
    """Data is missing, malformed or too little."""


class NetError(TrainError):
    """A network cannot be built from its specification."""


class DivergedError(TrainError):
    """Training went wrong; the last good state is kept."""


class RunError(TrainError):
    """A run cannot be read, written or resumed."""
