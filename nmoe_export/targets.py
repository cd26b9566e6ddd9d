"""How each kind of device wants its int8 graphs: fixed profiles, each value with its reason."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from nmoe_export.errors import SourceError

Name = Literal["x86", "pi", "jetson"]


@dataclass(frozen=True, slots=True)
class Target:
    """The profile of one kind of device."""

    name: Name
    machine: tuple[str, ...]
    """The values of platform.machine() on it. int8 for this target is timed on such a machine only."""
    activations: Literal["uint8", "int8"]
    symmetric: bool
    """Whether the zero point of activations is zero."""
    reduce_range: bool
    """Whether weights use 7 bits, for CPUs that add 8-bit products in 16 bits, where they overflow."""
    fuses_conv_with_next: bool
    """Whether a Conv fuses with the Relu or Add after it only when there is no rounding between them."""
    small_graphs: Literal["int8", "fp16"]
    """The reduced precision of gates and experts, which are a few small Gemms."""


TARGETS: dict[str, Target] = {
    "x86": Target(
        "x86",
        ("x86_64", "AMD64"),
        activations="uint8",  # U8S8 fuses every Conv and Add; S8S8 leaves most of them in float
        symmetric=False,  # asymmetric ranges use all 256 levels after a ReLU
        reduce_range=False,  # needed only by CPUs without VNNI
        fuses_conv_with_next=False,  # QLinearConv and QLinearAdd want rounding between them
        small_graphs="int8",
    ),
    "pi": Target(
        "pi",
        ("aarch64", "arm64"),
        activations="uint8",  # fuses fully on ARM too, so that the graphs equal those for x86
        symmetric=False,
        reduce_range=False,
        fuses_conv_with_next=False,
        small_graphs="int8",
    ),
    "jetson": Target(
        "jetson",
        (),  # TensorRT does not run where bundles are made
        activations="int8",
        symmetric=True,  # TensorRT accepts symmetric activations only
        reduce_range=False,
        fuses_conv_with_next=True,
        small_graphs="fp16",  # int8 does not make a small Gemm faster in TensorRT
    ),
}


def target_of(name: str) -> Target:
    """The target of this name; `auto` is the one for this machine's CPU. Raises SourceError for an unknown name."""
    if name == "auto":
        for target in TARGETS.values():
            if platform.machine() in target.machine:
                return target
        return TARGETS["x86"]
    if name not in TARGETS:
        raise SourceError(f"unknown target {name!r}; expected auto, {', '.join(TARGETS)}")
    return TARGETS[name]
