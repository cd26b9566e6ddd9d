"""Everything that nmoe_export raises on purpose.

ExportError
├── SourceError   what is to be exported cannot be: a broken run, shapes that disagree
├── GraphError    a module that the exporter cannot turn into a graph, or whose graph answers otherwise
└── DropError     int8 that costs more than is allowed
"""

from __future__ import annotations


class ExportError(Exception):
    """The root: its text is one line that says what to do."""


class SourceError(ExportError):
    """What is to be exported is not in order."""


class GraphError(ExportError):
    """A module has no graph that gives its answers."""


class DropError(ExportError):
    """No int8 fleet stays within the drop that is allowed."""
