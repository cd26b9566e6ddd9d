"""What travels to a device: the runtime of a networked mixture of experts.

Imports neither torch nor onnx nor its sisters nmoe_train and nmoe_export.
"""

__version__ = "0.1.0"
"""As in pyproject.toml; importlib.metadata would bring a megabyte of e-mail along."""
