"""Send and receive the frames of one message on a ZeroMQ socket.

pyzmq's own calls compute flags with enums, which takes longer than sending; these use plain integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import zmq

_send = zmq.backend.Socket.send
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def send_frames(target: zmq.Socket[bytes], frames: Sequence[bytes]) -> bool:
    """Send a whole message without waiting. False: nothing was sent, as no peer is connected or its queue is full."""
    last = len(frames) - 1
    try:
        for i, frame in enumerate(frames):
            _send(target, frame, _NOBLOCK if i == last else _NOBLOCK_MORE)
    except zmq.ZMQError:
        return False
    return True


def receive_frames(source: zmq.Socket[bytes]) -> tuple[zmq.Frame, list[bytes]]:
    """The message that waits on `source`: its first frame, which knows the sender, and the bytes of the others."""
    first = frame = source.recv(copy=False)
    rest = []
    while frame.more:
        frame = source.recv(copy=False)
        rest.append(frame.bytes)
    return first, rest


def readable(sources: Iterable[zmq.Socket[bytes]], wait_ms: int = 0) -> list[tuple[Any, int]]:
    """The sockets on which a message waits; an empty list after `wait_ms`. The integers are poll flags."""
    return zmq.zmq_poll([(source, _POLLIN) for source in sources], wait_ms)


def writable(target: zmq.Socket[bytes], wait_ms: int) -> bool:
    """Whether a message can be sent, at the latest after `wait_ms`."""
    return bool(zmq.zmq_poll([(target, _POLLOUT)], wait_ms))
