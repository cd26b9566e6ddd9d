"""The one door to torchvision, which opens also where its compiled operators do not fit the installed torch.

A torchvision built for CUDA next to a torch built for CPU fails at import because two of its operators are unknown. We
use its networks, data sets and transforms, none of which needs them; declaring the two is enough.
"""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError as error:
    if "does not exist" not in str(error):
        raise
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

from torchvision import datasets, models

__all__ = ["datasets", "models"]
