"""The networks, and how one is built from a name and arguments: a run holds those, never a pickled object.

A specification is a name of REGISTRY, or `package.module:factory` for anybody's own. Extractors take images as they
come (uint8 or float, 0 to 255, NCHW): normalisation is theirs, so that what is exported takes raw images.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nmoe_edge.common.imports import import_path
from nmoe_train.errors import NetError


@dataclass(frozen=True, slots=True)
class NetSpec:
    """How to build one network."""

    factory: str
    """A name of REGISTRY, or `package.module:factory`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the factory is called with: JSON, nothing else."""


def he_(net: nn.Module) -> None:
    """He's initialisation: without it four layers of ReLU stay near chance for twenty rounds."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Small(nn.Module):
    """A convolutional extractor without BatchNorm, whose averages would not survive averaging over unlike clients."""

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int = 64,
        widths: Sequence[int] = (16, 32, 32),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """For images of `channels` × `size` × `size`; `mean` and `std` are those of the pixels scaled to 0..1."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        strides = (1, *[2] * (len(widths) - 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1)
            for (a, b), stride in zip(pairwise((channels, *widths)), strides, strict=True)
        )
        for stride in strides:
            size = (size - 1) // stride + 1
        self.project = nn.Linear(widths[-1] * size * size, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        he_(self)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, dim)
        x = (x.float() / 255 - self.mean) / self.std
        for convolution in self.convolutions:
            x = convolution(x).relu()
        return self.norm(self.project(x.flatten(1)))


class ResNet18(nn.Module):
    """torchvision's ResNet18 as an extractor, without its pooled classifier."""

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int = 512,
        norm: Literal["group", "batch", "none"] = "group",
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """For images of `channels` × `size` × `size`; up to 64 pixels the first layers keep the size (the CIFAR stem).

        GroupNorm by default: BatchNorm's averages do not survive averaging over unlike clients.
        """
        from nmoe_train.data.vision import models

        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "group": lambda width: nn.GroupNorm(min(32, width // 4), width),
            "batch": nn.BatchNorm2d,
            "none": lambda _width: nn.Identity(),
        }
        if norm not in norms:
            raise ValueError(f"norm is {norm!r}, none of {', '.join(norms)}")
        net = models.resnet18(norm_layer=norms[norm])
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False) if size <= 64 else net.conv1
        if size <= 64:
            net.maxpool = nn.Identity()
        he_(net)
        for block in net.modules():
            # Residual branches that start as zero: with GroupNorm it sat at chance for 250 steps without.
            last = getattr(block, "bn2", None)
            if isinstance(last, (nn.GroupNorm, nn.BatchNorm2d)):
                nn.init.zeros_(last.weight)
            elif last is not None:
                nn.init.zeros_(block.conv2.weight)
        net.fc = nn.Identity() if dim == 512 else nn.Linear(512, dim)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        self.net = net
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, dim)
        return self.norm(self.net((x.float() / 255 - self.mean) / self.std))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: an expert, or a gate that is not linear."""

    def __init__(self, dim: int, outputs: int, widths: Sequence[int] = (64, 32, 32)) -> None:
        """(B, dim) -> (B, outputs); with three `widths`, the four layers of the paper's experts."""
        layers: list[nn.Module] = []
        for a, b in pairwise((dim, *widths)):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers, nn.Linear((dim, *widths)[-1], outputs))
        he_(self)


def linear(dim: int, outputs: int) -> nn.Module:
    """(B, dim) -> (B, outputs): the gate of the paper."""
    return nn.Linear(dim, outputs)


class Random(nn.Module):
    """RanGate: whom a latent goes to is drawn with given probabilities, and the same for the same latent everywhere.

    A number uⱼ, as good as uniform, is made of the latent for each expert: the phase of a random projection, of which
    like latents are turns apart. The largest of uⱼ^(1/pⱼ) is expert j's with probability pⱼ.
    """

    TURNS = 4.0
    """Standard deviation of the phase over normalised latents: enough to forget where it came from."""

    def __init__(self, dim: int, outputs: int, shares: Sequence[float]) -> None:
        """(B, dim) -> (B, outputs)"""
        super().__init__()
        if len(shares) != outputs:
            raise ValueError(f"{len(shares)} shares for {outputs} outputs")
        self.register_buffer("weight", torch.randn(outputs, dim) * self.TURNS / dim**0.5)
        self.register_buffer("power", 1 / (outputs * torch.tensor(list(shares))))

    def forward(self, h: Tensor) -> Tensor:
        phase = h @ self.weight.T
        u = 2 * (phase - phase.floor() - 0.5).abs()  # a triangle wave has no jumps that rounding could cross
        return u.clamp(min=0.05) ** self.power


REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "small": Small,
    "resnet18": ResNet18,
    "mlp": MLP,
    "linear": linear,
    "random": Random,
}


def build(spec: NetSpec) -> nn.Module:
    """The network of a specification, with fresh weights, in eval mode."""
    factory = _imported(spec.factory) if ":" in spec.factory else _registered(spec.factory)
    try:
        net = factory(**spec.arguments)
    except Exception as error:  # whatever somebody's factory does
        raise NetError(f"{spec.factory} cannot be built with {dict(spec.arguments)}: {_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise NetError(f"{spec.factory} returned {type(net).__name__}, not a torch.nn.Module")
    return net.eval()


def _registered(name: str) -> Callable[..., nn.Module]:
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(REGISTRY)}, or package.module:factory"
        raise NetError(f"no network is called {name!r}; {hint}")
    return REGISTRY[name]


def _imported(path: str) -> Callable[..., nn.Module]:
    try:
        return import_path(path)
    except Exception as error:  # whatever somebody's module does when it is imported
        raise NetError(f"{path} cannot be imported: {_line(error)}") from error


def probe(extractor: nn.Module, shape: Sequence[int], dim: int) -> None:
    """Try an extractor with two images, there and back: NetError says what is wrong with it."""
    name = type(extractor).__name__
    x = torch.arange(2 * math.prod(shape)).remainder(251).to(torch.uint8).reshape(2, *shape)
    try:
        extractor.train()
        h = extractor(x)
        if not isinstance(h, Tensor):
            raise NetError(f"{name} returns {type(h).__name__}, not one tensor of latents")
        if h.shape != (2, dim):
            raise NetError(f"{name} makes latents of {list(h.shape)} of two images, not [2, {dim}]; see extractor.dim")
        if h.dtype != torch.float32:
            raise NetError(f"{name} makes latents of {h.dtype}, not torch.float32")
        if h.requires_grad:
            h.sum().backward()
    except NetError:
        raise
    except Exception as error:  # whatever somebody's forward() does
        raise NetError(f"{name} fails on two uint8 images of {list(shape)}: {_line(error)}") from error
    finally:
        extractor.zero_grad(set_to_none=True)
        extractor.eval()
    if len(extractor.state_dict()) > len(
        {value.data_ptr() for value in extractor.state_dict().values() if value.numel()}
    ):
        raise NetError(f"{name} has two names for one weight; federated averages and safetensors need one for each")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
