"""The networks, and how one is built from a factory's name and its arguments.

A run stores name and arguments, never a pickled object. The name is a key of REGISTRY or, for a network of your own,
`package.module:factory`. Extractors take raw images, uint8 or float (B, C, H, W) with pixels 0 to 255, and normalise
them themselves, so that an exported extractor takes raw images too.
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
from torch.nn.functional import max_pool2d

from nmoe_edge.common.imports import import_path
from nmoe_train.errors import NetError


@dataclass(frozen=True, slots=True)
class NetSpec:
    """How to build one network."""

    factory: str
    """A key of REGISTRY, or `package.module:factory`"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory; JSON values only"""


def _initialise(net: nn.Module) -> None:
    """He initialisation. With PyTorch's default, four layers of ReLU stay near chance for twenty rounds."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Small(nn.Module):
    """A small convolutional extractor for images of `channels` × `size` × `size`.

    It has no BatchNorm, because FedAvg over clients with different data ruins BatchNorm's running statistics. The
    latent is normalised to mean 0 and variance 1.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int = 64,
        widths: Sequence[int] = (16, 32, 32),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """mean, std: of each channel of the training images, with pixels scaled to 0..1"""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        strides = (1, *[2] * (len(widths) - 1))
        self.convolutions = nn.ModuleList()
        for (inputs, outputs), stride in zip(pairwise((channels, *widths)), strides, strict=True):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1))
            size = (size - 1) // stride + 1
        self.project = nn.Linear(widths[-1] * size * size, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, dim)
        x = (x.float() / 255 - self.mean) / self.std
        for convolution in self.convolutions:
            x = convolution(x).relu()
        return self.norm(self.project(x.flatten(1)))


class ResNet9(nn.Module):
    """A residual network of seven convolutions for images of `channels` × `size` × `size`, made to train on a CPU.

    The first convolution keeps the size. Each later width adds a block: a convolution that is pooled to half the size,
    and a residual one. GroupNorm replaces BatchNorm, because FedAvg over clients with different data ruins BatchNorm's
    running statistics. Residual branches start as zero.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int = 128,
        widths: Sequence[int] = (24, 64, 128, 128),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """mean, std: of each channel of the training images, with pixels scaled to 0..1"""
        super().__init__()
        if size < 2 ** (len(widths) - 1):
            raise ValueError(f"{len(widths)} widths halve the size too often for images of {size} pixels; give fewer")
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        self.first = _convolution(channels, widths[0])
        self.shrink = nn.ModuleList(_convolution(*pair) for pair in pairwise(widths))
        self.residual = nn.ModuleList(_convolution(width, width) for width in widths[1:])
        self.project = nn.Identity() if dim == widths[-1] else nn.Linear(widths[-1], dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        _initialise(self)
        for branch in self.residual:
            nn.init.zeros_(branch[1].weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, dim)
        x = self.first((x.float() / 255 - self.mean) / self.std).relu()
        for shrink, residual in zip(self.shrink, self.residual, strict=True):
            x = max_pool2d(shrink(x), 2).relu()
            x = x + residual(x).relu()
        return self.norm(self.project(x.amax((2, 3))))


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    norm = nn.GroupNorm(max(1, outputs // 16), outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm)


class ResNet18(nn.Module):
    """torchvision's ResNet18 without its classifier, for images of `channels` × `size` × `size`.

    Up to 64 pixels the first layers do not reduce the size (the usual change for CIFAR). GroupNorm is the default,
    because FedAvg over clients with different data ruins BatchNorm's running statistics.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dim: int = 512,
        norm: Literal["group", "batch", "none"] = "group",
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """mean, std: of each channel of the training images, with pixels scaled to 0..1"""
        from nmoe_train.vision import models

        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "group": lambda width: nn.GroupNorm(min(32, width // 4), width),
            "batch": nn.BatchNorm2d,
            "none": lambda _width: nn.Identity(),
        }
        if norm not in norms:
            raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(norms)}")
        net = models.resnet18(norm_layer=norms[norm])
        if size <= 64:
            net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        _initialise(net)
        for block in net.modules():
            # Every residual branch starts as zero. Without this, training with GroupNorm stays at chance for 250 steps.
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
    """Linear layers with ReLU between them: an expert, or a gate with hidden layers. (B, dim) -> (B, outputs)"""

    def __init__(self, dim: int, outputs: int, widths: Sequence[int] = (64, 32, 32)) -> None:
        """widths: of the hidden layers; three of them make the paper's four-layer expert"""
        sizes = (dim, *widths)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], outputs))
        _initialise(self)


def linear(dim: int, outputs: int) -> nn.Module:
    """The paper's gate, one linear layer. (B, dim) -> (B, outputs)"""
    return nn.Linear(dim, outputs)


class Random(nn.Module):
    """RanGate: draws one of N experts at random, expert j with probability pⱼ. (B, dim) -> (B, N)

    The draw is a function of the latent, so that every device sends the same latent to the same expert and the gate can
    be exported like any other network. For each expert the latent gives a number uⱼ that is close to uniform in 0..1:
    the phase of a random projection, scaled so that even similar latents are several turns apart. The score of expert j
    is uⱼ^(1/pⱼ), up to a common power; for independent uniform uⱼ it is the highest with probability pⱼ.
    """

    TURNS = 4.0
    """Standard deviation of the phase over normalised latents, in turns; enough that the phase looks uniform"""

    def __init__(self, dim: int, outputs: int, shares: Sequence[float]) -> None:
        """shares: pⱼ of each of the `outputs` experts"""
        super().__init__()
        if len(shares) != outputs:
            raise ValueError(f"there are {len(shares)} shares for {outputs} outputs; give one each")
        self.register_buffer("weight", torch.randn(outputs, dim) * self.TURNS / dim**0.5)
        self.register_buffer("power", 1 / (outputs * torch.tensor(list(shares))))

    def forward(self, h: Tensor) -> Tensor:
        phase = h @ self.weight.T  # (B, N), in turns
        # A triangle wave: unlike the phase itself it has no jumps, so rounding errors cannot change the draw much.
        u = 2 * (phase - phase.floor() - 0.5).abs()
        return u.clamp(min=0.05) ** self.power


class StatGate(nn.Module):
    """A gate assembled from statistics (stages/statgate.py): linear and quadratic scores. (B, dim) -> (B, N)

    An expert's score is the log-sum-exp over its groups of linear functions, and a quadratic form: a signed sum of
    squares along `rank` directions of its own, or with `diagonal` a weighted sum of the latent's squares.
    """

    def __init__(self, dim: int, outputs: int, groups: int = 1, rank: int = 0, diagonal: bool = False) -> None:
        super().__init__()
        self.outputs = outputs
        self.groups = groups
        self.rank = rank
        self.diagonal = diagonal
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("weight", torch.zeros(outputs * groups, dim))
        self.register_buffer("bias", torch.zeros(outputs * groups))
        self.register_buffer("sharpness", torch.ones(()))
        if diagonal:
            self.register_buffer("squares", torch.zeros(outputs, dim))
        else:
            self.register_buffer("directions", torch.zeros(outputs * rank, dim))
            self.register_buffer("signs", torch.zeros(outputs, rank))

    def forward(self, h: Tensor) -> Tensor:
        h = h - self.center
        scores = h @ self.weight.T + self.bias  # (B, N · groups)
        if self.groups > 1:
            scores = scores.reshape(-1, self.outputs, self.groups).logsumexp(2)
        if self.diagonal:
            scores = scores + (h * h) @ self.squares.T
        elif self.rank:
            along = (h @ self.directions.T).reshape(-1, self.outputs, self.rank)
            scores = scores + (along * along * self.signs).sum(2)
        return scores * self.sharpness


REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "small": Small,
    "resnet9": ResNet9,
    "resnet18": ResNet18,
    "mlp": MLP,
    "linear": linear,
    "random": Random,
    "statgate": StatGate,
}


def build(spec: NetSpec) -> nn.Module:
    """Build a network with fresh weights, in eval mode. NetError if that fails."""
    factory = _import_factory(spec.factory) if ":" in spec.factory else _find_factory(spec.factory)
    try:
        net = factory(**spec.arguments)
    except Exception as error:  # a user's factory may raise anything
        raise NetError(f"{spec.factory} cannot be built with {dict(spec.arguments)}: {_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise NetError(f"{spec.factory} returned {type(net).__name__}, not a torch.nn.Module; return a module")
    return net.eval()


def _find_factory(name: str) -> Callable[..., nn.Module]:
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, 1)
        known = f"expected one of {', '.join(REGISTRY)}, or package.module:factory"
        hint = f"did you mean {close[0]!r}?" if close else known
        raise NetError(f"unknown network {name!r}; {hint}")
    return REGISTRY[name]


def _import_factory(path: str) -> Callable[..., nn.Module]:
    try:
        return import_path(path)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise NetError(f"{path} cannot be imported: {_line(error)}") from error


def probe(extractor: nn.Module, shape: Sequence[int], dim: int) -> None:
    """Run an extractor forward and backward on two images before anything is trained. NetError says what to change.

    shape: (C, H, W) of an image; dim: numbers of a latent
    """
    name = type(extractor).__name__
    x = torch.arange(2 * math.prod(shape)).remainder(251).to(torch.uint8).reshape(2, *shape)
    try:
        extractor.train()
        h = extractor(x)
        _check_latents(name, h, dim)
        if h.requires_grad:
            h.sum().backward()
    except NetError:
        raise
    except Exception as error:  # a user's forward() may raise anything
        raise NetError(
            f"the extractor {name} fails on two uint8 images of {list(shape)}: {_line(error)}."
            " It gets raw pixels; convert them first, for example x.float() / 255"
        ) from error
    finally:
        extractor.zero_grad(set_to_none=True)
        extractor.eval()
    weights = extractor.state_dict()
    addresses = {value.data_ptr() for value in weights.values() if value.numel()}
    if len(weights) > len(addresses):
        raise NetError(
            f"the extractor {name} has two names for one weight, but FedAvg and safetensors need one name each;"
            " give each layer its own weight"
        )


def _check_latents(name: str, h: object, dim: int) -> None:
    """h: the extractor's result for two images; it must be float32 (2, dim)"""
    if not isinstance(h, Tensor):
        raise NetError(f"the extractor {name} returned {type(h).__name__}, not one tensor; return the latents alone")
    shape = tuple(h.shape)
    expected = (2, dim)
    if h.ndim != 2 or len(h) != 2:
        advice = "Flatten it: end forward() with x.flatten(1)" if h.ndim > 2 else "Return one row per image"
        raise NetError(f"the extractor {name} returned {shape} for 2 images; it must return {expected}. {advice}")
    if shape != expected:
        raise NetError(
            f"the extractor {name} returned {shape} for 2 images; it must return {expected}."
            f" Set extractor.dim = {shape[1]}, or change the network"
        )
    if h.dtype != torch.float32:
        raise NetError(f"the extractor {name} returned {h.dtype}, not torch.float32; convert with .float()")


def _line(error: Exception) -> str:
    """An error's type and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
