"""The wire and what is decided from it: no socket, no clock, no onnxruntime. See WIRE.md."""
