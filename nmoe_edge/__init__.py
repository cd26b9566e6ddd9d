"""The runtime of a networked mixture of experts on a device. It imports neither torch nor onnx nor its sister packages.

API.md shows what applications may import from here; everything else is internal.
"""

import os
from typing import TYPE_CHECKING

from nmoe_edge.common.public import lazy_names

if TYPE_CHECKING:
    from nmoe_edge.client import Answers, Client
    from nmoe_edge.device.node import Node
    from nmoe_edge.device.rules import Rules
    from nmoe_edge.errors import CallError, EdgeError

__all__ = ["Answers", "CallError", "Client", "EdgeError", "Node", "Rules"]
__version__ = "0.3.0"
"""As in pyproject.toml. importlib.metadata would import the email package, a megabyte."""

# onnxruntime's Linux wheels (at least 1.29 to 1.31) write an id and an event to report as soon as they are imported. A
# device has nothing to report. Set the variable to 0 to allow it.
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    os.environ.setdefault(_name, "1")

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Answers": "client",
        "CallError": "errors",
        "Client": "client",
        "EdgeError": "errors",
        "Node": "device.node",
        "Rules": "device.rules",
    },
)
