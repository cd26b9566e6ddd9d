"""Messages, and every decision made from them. Pure: no socket, clock, disk or onnxruntime. See WIRE.md."""
