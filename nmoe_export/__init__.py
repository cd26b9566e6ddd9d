"""From a training run, or torch modules, to one verified ONNX bundle per device.

API.md shows what applications may import from here.
"""

from typing import TYPE_CHECKING

from nmoe_edge.common.public import lazy_names  # importing nmoe_edge first disables onnxruntime's telemetry

if TYPE_CHECKING:
    from nmoe_export.calibrate import Recipe, read_recipe
    from nmoe_export.errors import DropError, ExportError
    from nmoe_export.export import Exported, Options, export_fleet
    from nmoe_export.source import of_modules

__all__ = ["DropError", "ExportError", "Exported", "Options", "Recipe", "export_fleet", "of_modules", "read_recipe"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DropError": "errors",
        "ExportError": "errors",
        "Exported": "export",
        "Options": "export",
        "Recipe": "calibrate",
        "export_fleet": "export",
        "of_modules": "source",
        "read_recipe": "calibrate",
    },
)
