"""What travels to a device: the runtime of a networked mixture of experts.

Imports neither torch nor onnx nor its sisters nmoe_train and nmoe_export.
"""

import os

__version__ = "0.2.0"
"""As in pyproject.toml; importlib.metadata would bring a megabyte of e-mail along."""

# onnxruntime's wheels for Linux write an id and an event to be sent home as soon as they are imported (1.29 to 1.31 at
# least). A device has nothing to report; who thinks otherwise sets the variable to 0.
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    os.environ.setdefault(_name, "1")
