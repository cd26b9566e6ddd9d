"""The errors that nmoe_export raises on purpose. The text of each is one line that says what is wrong and what to do.

ExportError
├── SourceError   the run, the modules, the options or the output folder cannot be used
├── GraphError    torch cannot export a module, or its graph computes something else
└── DropError     int8 or float16 costs more accuracy than is allowed
"""

from __future__ import annotations


class ExportError(Exception):
    """The root of the tree."""


class SourceError(ExportError):
    """The run, the modules, the options or the output folder cannot be used."""


class GraphError(ExportError):
    """A module has no ONNX graph that computes the same."""


class DropError(ExportError):
    """The fleet loses more accuracy in int8 or float16 than is allowed."""
