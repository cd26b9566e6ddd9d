"""Federated training of a networked mixture of experts. API.md shows what applications may import from here."""

from typing import TYPE_CHECKING

from nmoe_edge.common.public import lazy_names

if TYPE_CHECKING:
    from nmoe_train.config import Config
    from nmoe_train.errors import TrainError
    from nmoe_train.pipeline import train
    from nmoe_train.run import Run, read_run

__all__ = ["Config", "Run", "TrainError", "read_run", "train"]

__getattr__, __dir__ = lazy_names(
    __name__, {"Config": "config", "Run": "run", "TrainError": "errors", "read_run": "run", "train": "pipeline"}
)
