"""What travels to a device: the runtime of a networked mixture of experts.

Imports neither torch nor onnx nor its sisters nmoe_train and nmoe_export.
"""
