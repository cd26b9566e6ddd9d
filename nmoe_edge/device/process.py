"""The process around a Node that serves: its signals, its interpreter settings and mDNS.

The command nmoe-edge serve uses it; what the device does is in node.py.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any

from nmoe_edge.common.memory import trim
from nmoe_edge.device.node import Node
from nmoe_edge.errors import NetworkError

_SIGNAL_CHECK_S = 0.5
"""How often the main thread wakes to run signal handlers, for signals that another thread received."""
_SWITCH_INTERVAL_S = 0.0005
"""Python's thread switch interval. With the default of 5 ms the extractor's thread waits ten times as long."""


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into calls of the node; keeps those that arrive before there is a node."""

    def __init__(self) -> None:
        self._node: Node | None = None
        self._early: list[Callable[[Node], None]] = []
        self._on(signal.SIGTERM, Node.leave)
        self._on(signal.SIGINT, Node.leave)
        self._on(signal.SIGHUP, Node.reload)

    def _on(self, number: int, action: Callable[[Node], None]) -> None:
        signal.signal(number, lambda *_: self._deliver(action))

    def _deliver(self, action: Callable[[Node], None]) -> None:
        if self._node is None:
            self._early.append(action)
        else:
            action(self._node)

    def attach(self, node: Node) -> None:
        """Pass signals to this node, starting with those that arrived before it."""
        self._node = node
        for action in self._early:
            action(node)


def prepare_interpreter() -> None:
    """Shorten the waits of threads, and give back the memory that loading the models needed."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # these objects live as long as the process, so the collector may skip them
    trim()


def discovery(node: Node) -> AbstractContextManager[Any]:
    """Announce this node by mDNS and find its peers, until the context ends."""
    if not node.address:
        node.close()
        raise NetworkError("--discover: this device listens at no address; give --fleet or --listen")
    try:
        from nmoe_edge.device.mdns import Discovery
    except ModuleNotFoundError as error:
        node.close()
        raise NetworkError(f"--discover: {error.name} is not installed; pip install 'nmoe[discover]'") from error
    manifest = node.models.manifest
    return closing(Discovery(manifest.device, manifest.trunk, node.address, node.peer_discovered))


def wait_until_ended(node: Node) -> None:
    """Return when the node has ended and saved what it learned; run signal handlers meanwhile."""
    while not node.ended.wait(_SIGNAL_CHECK_S):
        pass
    node.close()  # `ended` is set before the class mix is on the disk
