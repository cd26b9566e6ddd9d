"""A training run -> one verified ONNX bundle a device."""

import nmoe_edge as _first  # noqa: F401  # before anything brings onnxruntime
