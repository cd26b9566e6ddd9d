"""Random views of images, a whole batch at once and where the images are; uint8 in, float from 0 to 255 out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

GREY = (0.299, 0.587, 0.114)


def shift(x: Tensor, g: torch.Generator) -> Tensor:
    """Shifted by up to an eighth. (B, C, H, W)"""
    n = len(x)
    return _placed(x, torch.ones(n, 2), _shifts(n, g), torch.ones(n))


def light(x: Tensor, g: torch.Generator) -> Tensor:
    """Shifted by up to an eighth, and mirrored half of the time."""
    n = len(x)
    return _placed(x, torch.ones(n, 2), _shifts(n, g), _mirror(n, g))


def crop(x: Tensor, g: torch.Generator) -> Tensor:
    """Half to all of the picture."""
    return _placed(x, *_crops(len(x), 0.5, g), torch.ones(len(x)))


def strong(x: Tensor, g: torch.Generator) -> Tensor:
    """FedSC's own: a fifth to all of the picture, mirrored, its colours changed (p = .8), made grey (p = .2)."""
    n, channels = len(x), x.shape[1]
    x = _placed(x, *_crops(n, 0.2, g), _mirror(n, g))
    x = _coloured(x, g)
    if channels == 3:
        grey = (torch.rand(n, generator=g) < 0.2).to(x.device)[:, None, None, None]
        x = torch.where(grey, _grey(x), x)
    return x


VIEWS = {"shift": shift, "light": light, "crop": crop, "strong": strong}


def _shifts(n: int, g: torch.Generator) -> Tensor:
    return (torch.rand(n, 2, generator=g) - 0.5) / 2  # of half the picture's width: an eighth of it


def _crops(n: int, least: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Size and place of a part of a picture, `least` to all of its area."""
    area = least + (1 - least) * torch.rand(n, generator=g)
    ratio = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    return size, (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - size)


def _mirror(n: int, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)


def _placed(x: Tensor, size: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """The part of each picture that is `size` of it and lies `shift` from its middle, both (n, 2), at full size."""
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size[:, 0] * mirror, size[:, 1]
    theta[:, :, 2] = shift
    grid = affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return grid_sample(x.float(), grid, padding_mode="zeros", align_corners=False)


def _coloured(x: Tensor, g: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation by ±.4 and hue by ±.1, for eight rows in ten."""
    n = len(x)
    change = torch.empty(3, n).uniform_(0.6, 1.4, generator=g).to(x.device)[:, :, None, None, None]
    angle = torch.empty(n).uniform_(-0.1, 0.1, generator=g) * 2 * math.pi
    changed = (x * change[0]).clamp(0, 255)
    middle = (_grey(changed) if x.shape[1] == 3 else changed).mean((1, 2, 3), keepdim=True)
    changed = (middle + change[1] * (changed - middle)).clamp(0, 255)
    if x.shape[1] == 3:
        grey = _grey(changed)
        changed = (grey + change[2] * (changed - grey)).clamp(0, 255)
        changed = torch.einsum("nij,njhw->nihw", _hue(angle).to(x.device), changed).clamp(0, 255)
    chosen = (torch.rand(n, generator=g) < 0.8).to(x.device)[:, None, None, None]
    return torch.where(chosen, changed, x)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor(GREY)[None, :, None, None]).sum(1, keepdim=True)


def _hue(angle: Tensor) -> Tensor:
    """Colours turned about the grey axis. (n,) -> (n, 3, 3)"""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    third, cross = torch.full((3, 3), 1 / 3), torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return cos * torch.eye(3) + (1 - cos) * third + sin * cross
