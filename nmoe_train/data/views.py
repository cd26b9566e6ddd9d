"""Random views of images (augmentation), for a whole batch at once and on the device of the images.

Images come in as uint8 or float (B, C, H, W), 0 to 255, and go out as float in the same range and shape. All randomness
comes from the generator, which lives on the CPU, so that a GPU gets the same views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)"""


def shift(x: Tensor, g: torch.Generator) -> Tensor:
    """Shifted by up to an eighth of the width and height."""
    n = len(x)
    return _cut_out(x, torch.ones(n, 2), _shifts(n, g), torch.ones(n))


def light(x: Tensor, g: torch.Generator) -> Tensor:
    """Shifted by up to an eighth, and mirrored with probability 1/2."""
    n = len(x)
    return _cut_out(x, torch.ones(n, 2), _shifts(n, g), _mirror(n, g))


def crop(x: Tensor, g: torch.Generator) -> Tensor:
    """A random part of the image, a half to all of its area, scaled to full size."""
    n = len(x)
    return _cut_out(x, *_crops(n, 0.5, g), torch.ones(n))


def strong(x: Tensor, g: torch.Generator) -> Tensor:
    """FedSC's views: a part of a fifth to all of the area, mirrored (p = 0.5), recoloured (p = 0.8), grey (p = 0.2)."""
    n, channels = len(x), x.shape[1]
    x = _cut_out(x, *_crops(n, 0.2, g), _mirror(n, g))
    x = _coloured(x, g)
    if channels == 3:
        chosen = (torch.rand(n, generator=g) < 0.2).to(x.device)[:, None, None, None]
        x = torch.where(chosen, _grey(x), x)
    return x


VIEWS = {"shift": shift, "light": light, "crop": crop, "strong": strong}


def _shifts(n: int, g: torch.Generator) -> Tensor:
    """Offsets (n, 2) in units of half an image: ±1/4 of that is ±1/8 of the width."""
    return (torch.rand(n, 2, generator=g) - 0.5) / 2


def _crops(n: int, min_area: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Size (n, 2) as a share of the image and offset (n, 2) of random parts with an area of `min_area` to 1."""
    area = min_area + (1 - min_area) * torch.rand(n, generator=g)
    ratio = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    offset = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - size)
    return size, offset


def _mirror(n: int, g: torch.Generator) -> Tensor:
    """-1 for an image to mirror, else 1, with equal chances. (n,)"""
    return torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)


def _cut_out(x: Tensor, size: Tensor, offset: Tensor, mirror: Tensor) -> Tensor:
    """A part of each image, scaled to full size; outside the image it is black.

    size: width and height as a share of the image (n, 2)
    offset: centre of the part from the centre of the image, in units of half an image (n, 2)
    mirror: -1 to mirror, else 1 (n,)
    """
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = size[:, 0] * mirror
    theta[:, 1, 1] = size[:, 1]
    theta[:, :, 2] = offset
    grid = affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return grid_sample(x.float(), grid, padding_mode="zeros", align_corners=False)


def _coloured(x: Tensor, g: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation changed by up to ±40 % and hue by ±10 % of a turn, with probability 0.8."""
    n = len(x)
    factors = torch.empty(3, n).uniform_(0.6, 1.4, generator=g).to(x.device)
    brightness, contrast, saturation = factors[:, :, None, None, None]
    angle = torch.empty(n).uniform_(-0.1, 0.1, generator=g) * 2 * math.pi
    is_colour = x.shape[1] == 3
    changed = (x * brightness).clamp(0, 255)
    mean = (_grey(changed) if is_colour else changed).mean((1, 2, 3), keepdim=True)
    changed = (mean + contrast * (changed - mean)).clamp(0, 255)
    if is_colour:
        grey = _grey(changed)
        changed = (grey + saturation * (changed - grey)).clamp(0, 255)
        changed = torch.einsum("nij,njhw->nihw", _hue_rotation(angle).to(x.device), changed).clamp(0, 255)
    chosen = (torch.rand(n, generator=g) < 0.8).to(x.device)[:, None, None, None]
    return torch.where(chosen, changed, x)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)"""
    return (x * x.new_tensor(GREY)[None, :, None, None]).sum(1, keepdim=True)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Rotations of RGB space about its grey axis, by angles in radians. (n,) -> (n, 3, 3)"""
    cos = angle.cos()[:, None, None]
    sin = angle.sin()[:, None, None]
    onto_axis = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return cos * torch.eye(3) + (1 - cos) * onto_axis + sin * cross
