"""What others ask of this device's expert: taken in order, run together, answered or refused.

Pings wait in the same queue: a device whose work stands still looks dead. Work whose budget is spent is never begun,
and more than the queue holds is refused at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from nmoe_edge.device.metrics import Metrics
from nmoe_edge.device.sockets import Sender
from nmoe_edge.errors import LocalProtocolError, ModelError
from nmoe_edge.models import Models
from nmoe_edge.protocol.messages import Answer, Ask, Message, Ping, Pong, Reason, Refuse, detail_of
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import DEFAULT_CAPS

MOST_ASKS = 512
MOST_ROWS = 8192
MOST_BYTES = DEFAULT_CAPS.payload_bytes
BATCH_ROWS = 256
"""Run together at most; an ask of more is run as it came."""

Reply = Callable[[Sender, Message], object]


class Service:
    """The queue of one expert."""

    def __init__(self, models: Models, reply: Reply, counts: Metrics) -> None:
        """models: may be replaced at any time between two runs."""
        self._reply, self._counts = reply, counts
        self.models = models
        self._queue: deque[tuple[Sender, Ask | Ping, float]] = deque()
        self._rows = 0

    @property
    def models(self) -> Models:
        """Whose expert answers."""
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        manifest = models.manifest
        self._models = models
        self._trunk, self._expert, self._dim = manifest.trunk_bytes, manifest.expert, manifest.latent.dim
        self._outputs = manifest.outputs

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, sender: Sender, message: Ask | Ping, now: float) -> None:
        """Take it on, or refuse it at once."""
        if type(message) is Ask:
            reason = self._objection(message)
            if reason is not None:
                self._refuse(sender, message.request, *reason)
                return
            self._rows += message.latents.shape[0]
        elif len(self._queue) >= MOST_ASKS:
            self._refuse(sender, message.request, Reason.BUSY, "")
            return
        self._queue.append((sender, message, now))

    def run(self) -> None:
        """Answer the first that are queued, as many as are run together: others than these have deadlines too."""
        batch = self._batch()
        if batch:
            self._answer(batch)

    def _objection(self, ask: Ask) -> tuple[Reason, str] | None:
        rows, dim = ask.latents.shape
        if ask.trunk != self._trunk:
            return Reason.WRONG_TRUNK, "these latents come from another extractor"
        if ask.expert != self._expert:
            return Reason.BAD_REQUEST, f"expert {self._expert} lives here, not {ask.expert}"
        if dim != self._dim:
            return Reason.BAD_REQUEST, f"latents have {self._dim} numbers, not {dim}"
        if rows * self._outputs * 4 > MOST_BYTES:
            return Reason.BAD_REQUEST, f"the answer to {rows} rows is over {MOST_BYTES} bytes; ask with fewer"
        if len(self._queue) >= MOST_ASKS or (self._queue and self._rows + rows > MOST_ROWS):
            return Reason.BUSY, ""
        return None

    def _batch(self) -> list[tuple[Sender, Ask, float]]:
        """The asks at the head of the queue that are run together; pings between them are answered in their turn."""
        batch: list[tuple[Sender, Ask, float]] = []
        rows = 0
        while self._queue:
            sender, message, came_at = self._queue[0]
            if type(message) is not Ask:
                if batch:
                    break
                self._queue.popleft()
                self._reply(sender, Pong(message.request))
                continue
            rows += message.latents.shape[0]
            if batch and rows > BATCH_ROWS:
                break
            self._queue.popleft()
            self._rows -= message.latents.shape[0]
            batch.append((sender, message, came_at))
        return batch

    def _answer(self, batch: list[tuple[Sender, Ask, float]]) -> None:
        began = time.monotonic()
        ready = []
        for sender, ask, came_at in batch:
            if began - came_at >= ask.budget_ms / 1000:
                self._refuse(sender, ask.request, Reason.EXPIRED, "")
            elif (ask.trunk, ask.expert) != (self._trunk, self._expert):
                self._refuse(sender, ask.request, Reason.WRONG_TRUNK, "the bundle was swapped since this came")
            else:
                ready.append((sender, ask))
        if not ready:
            return
        latents = [ask.latents.unpack() for _, ask in ready]
        try:
            outputs = self._models.expert(np.concatenate(latents) if len(latents) > 1 else latents[0])
        except ModelError as error:
            for sender, ask in ready:
                self._refuse(sender, ask.request, Reason.FAILED, detail_of(str(error)))
            return
        compute_us = min(int((time.monotonic() - began) * 1e6), 2**32 - 1)
        start = 0
        for sender, ask in ready:
            rows = slice(start, start + ask.latents.shape[0])
            start = rows.stop
            try:
                answer = Answer(ask.request, self._expert, compute_us, Tensor.pack(outputs[rows], "float32"))
            except LocalProtocolError as error:  # NaN of latents that no extractor makes
                self._refuse(sender, ask.request, Reason.FAILED, detail_of(str(error)))
                continue
            self._reply(sender, answer)
        self._counts.events["rows answered for others"] += start
        self._counts.events["runs for others"] += 1

    def _refuse(self, sender: Sender, request: int, reason: Reason, detail: str) -> None:
        self._counts.events[f"refused {reason.name.lower()}"] += 1
        self._reply(sender, Refuse(request, reason, detail))
