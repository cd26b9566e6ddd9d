"""What boards want of an int8 graph: frozen profiles, each value with its reason."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from nmoe_export.errors import SourceError

Name = Literal["x86", "pi", "jetson"]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of board."""

    name: Name
    machine: tuple[str, ...]
    """What platform.machine() says on it: elsewhere nothing can be measured for it."""
    activations: Literal["uint8", "int8"]
    symmetric: bool
    """Whether activations have their zero point at zero."""
    reduce_range: bool
    """Seven bits of weights, for CPUs whose 8-bit products overflow 16 bits."""
    fuses_conv_with_next: bool
    """Whether a Conv and the Relu or Add after it are one kernel only when nothing is rounded between them."""
    small_graphs: Literal["int8", "fp16"]
    """What gate and expert, a few small Gemms, are made."""


TARGETS: dict[str, Target] = {
    "x86": Target(
        "x86",
        ("x86_64", "AMD64"),
        activations="uint8",  # U8S8 fuses every Conv and Add; S8S8 leaves most in float
        symmetric=False,  # a ReLU's whole range is used
        reduce_range=False,  # only CPUs without VNNI need it
        fuses_conv_with_next=False,  # QLinearConv and QLinearAdd want it rounded
        small_graphs="int8",
    ),
    "pi": Target(
        "pi",
        ("aarch64", "arm64"),
        activations="uint8",  # fuses fully on ARM too, and so one graph serves both kinds of CPU
        symmetric=False,
        reduce_range=False,
        fuses_conv_with_next=False,
        small_graphs="int8",
    ),
    "jetson": Target(
        "jetson",
        (),  # TensorRT is not to be had where bundles are made
        activations="int8",
        symmetric=True,  # TensorRT takes no other
        reduce_range=False,
        fuses_conv_with_next=True,
        small_graphs="fp16",  # TensorRT gains nothing on a small Gemm
    ),
}


def target_of(name: str) -> Target:
    """A target by name; `auto` is the CPU of this machine."""
    if name == "auto":
        here = [target for target in TARGETS.values() if platform.machine() in target.machine]
        return here[0] if here else TARGETS["x86"]
    if name not in TARGETS:
        raise SourceError(f"no target is called {name!r}; there are auto, {', '.join(TARGETS)}")
    return TARGETS[name]
