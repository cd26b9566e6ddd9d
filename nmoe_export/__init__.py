"""A training run -> one verified ONNX bundle a device."""
