"""Frames through a ZeroMQ socket. pyzmq's own calls do arithmetic with enums, which takes longer than sending."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import zmq

_send = zmq.backend.Socket.send
_POLLIN, _POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def send_frames(by: zmq.Socket[bytes], frames: Sequence[bytes]) -> bool:
    """All of a message, or False and none of it: nobody is there, or too much waits for them already."""
    last = len(frames) - 1
    try:
        for i, frame in enumerate(frames):
            _send(by, frame, _NOBLOCK if i == last else _NOBLOCK_MORE)
    except zmq.ZMQError:
        return False
    return True


def receive_frames(source: zmq.Socket[bytes]) -> tuple[zmq.Frame, list[bytes]]:
    """A message that is there: its first frame, which knows who sent it, and the others."""
    first = frame = source.recv(copy=False)
    rest = []
    while frame.more:
        frame = source.recv(copy=False)
        rest.append(frame.bytes)
    return first, rest


def waiting(sources: Iterable[zmq.Socket[bytes]], wait_ms: int = 0) -> list[tuple[Any, int]]:
    """Which sockets have a message; after so long, none."""
    return zmq.zmq_poll([(source, _POLLIN) for source in sources], wait_ms)


def writable(by: zmq.Socket[bytes], wait_ms: int) -> bool:
    """Whether there is a way for a message, at last after so long."""
    return bool(zmq.zmq_poll([(by, _POLLOUT)], wait_ms))
