"""Weights as dictionaries of tensors: copy them from a network, select some by prefix, move them to another device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nmoe_train.stages.federation import State


def copy_state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}


def select_part(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries named `prefix`…, with the prefix removed from their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def to_device(states: Sequence[State], device: torch.device) -> list[State]:
    """The states on another device. A state that clients share is copied once and stays shared."""
    copies: dict[int, State] = {}
    for state in states:
        if id(state) not in copies:
            copies[id(state)] = {key: value.to(device).contiguous() for key, value in state.items()}
    return [copies[id(state)] for state in states]
