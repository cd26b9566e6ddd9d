"""Answers the Asks of peers with this device's own expert, in order; Asks that wait are run together.

Pings wait in the same queue, so a device that makes no progress looks dead to its peers. An Ask is never
run once its budget is spent. What exceeds the queue is refused at once.
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
from nmoe_edge.protocol.messages import Answer, Ask, Message, Ping, Pong, Reason, Refuse, microseconds, refusal_detail
from nmoe_edge.protocol.tensor import Tensor
from nmoe_edge.protocol.wire import DEFAULT_CAPS

MAX_ASKS = 512
"""Asks and Pings in the queue."""
MAX_ROWS = 8192
"""Rows in the queue; an empty queue accepts a larger Ask."""
MAX_BYTES = DEFAULT_CAPS.payload_bytes
BATCH_ROWS = 256
"""Rows that are run together at most; a larger Ask is run by itself."""

Reply = Callable[[Sender, Message], object]


class Service:
    """The queue of this device's expert."""

    def __init__(self, models: Models, reply: Reply, metrics: Metrics) -> None:
        """models: the initial bundle; the attribute may be replaced between two runs."""
        self._reply = reply
        self._metrics = metrics
        self.models = models
        self._queue: deque[tuple[Sender, Ask | Ping, float]] = deque()
        self._queued_rows = 0

    @property
    def models(self) -> Models:
        """The models that answer."""
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        manifest = models.manifest
        self._models = models
        self._trunk = manifest.trunk_bytes
        self._expert = manifest.expert
        self._latent_dim = manifest.latent.dim
        self._outputs = manifest.outputs

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, sender: Sender, message: Ask | Ping, now: float) -> None:
        """Queue a message, or refuse it at once."""
        if type(message) is Ask:
            objection = self._objection(message)
            if objection is not None:
                self._refuse(sender, message.request, *objection)
                return
            self._queued_rows += message.latents.shape[0]
        elif len(self._queue) >= MAX_ASKS:
            self._refuse(sender, message.request, Reason.BUSY, "")
            return
        self._queue.append((sender, message, now))

    def run(self) -> None:
        """Run one batch from the head of the queue and reply. The rest waits, as the node has other work too."""
        batch = self._next_batch()
        if batch:
            self._answer(batch)

    def _objection(self, ask: Ask) -> tuple[Reason, str] | None:
        """Why an Ask is refused; None when it is accepted."""
        rows, dim = ask.latents.shape
        if ask.trunk != self._trunk:
            return Reason.WRONG_TRUNK, "these latents come from another extractor"
        if ask.expert != self._expert:
            return Reason.BAD_REQUEST, f"this device has expert {self._expert}, not {ask.expert}"
        if dim != self._latent_dim:
            return Reason.BAD_REQUEST, f"latents have {dim} numbers; expected {self._latent_dim}"
        if rows * self._outputs * 4 > MAX_BYTES:
            return Reason.BAD_REQUEST, f"the answer to {rows} rows is over {MAX_BYTES} bytes; ask with fewer"
        if len(self._queue) >= MAX_ASKS or (self._queue and self._queued_rows + rows > MAX_ROWS):
            return Reason.BUSY, ""
        return None

    def _next_batch(self) -> list[tuple[Sender, Ask, float]]:
        """Take the Asks at the head of the queue that are run together.

        A Ping at the head is answered at once; a Ping behind an Ask ends the batch, as it is answered after that Ask.
        """
        batch: list[tuple[Sender, Ask, float]] = []
        rows = 0
        while self._queue:
            sender, message, arrived_at = self._queue[0]
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
            self._queued_rows -= message.latents.shape[0]
            batch.append((sender, message, arrived_at))
        return batch

    def _answer(self, batch: list[tuple[Sender, Ask, float]]) -> None:
        began = time.monotonic()
        ready = []
        for sender, ask, arrived_at in batch:
            if began - arrived_at >= ask.budget_ms / 1000:
                self._refuse(sender, ask.request, Reason.EXPIRED, "")
            elif (ask.trunk, ask.expert) != (self._trunk, self._expert):
                self._refuse(sender, ask.request, Reason.WRONG_TRUNK, "the bundle was replaced after this Ask arrived")
            else:
                ready.append((sender, ask))
        if not ready:
            return
        latents = [ask.latents.unpack() for _, ask in ready]  # each (rows, latent)
        try:
            outputs = self._models.expert(np.concatenate(latents) if len(latents) > 1 else latents[0])
        except ModelError as error:
            for sender, ask in ready:
                self._refuse(sender, ask.request, Reason.FAILED, refusal_detail(str(error)))
            return
        compute_us = microseconds(time.monotonic() - began)
        start = 0
        for sender, ask in ready:
            rows = slice(start, start + ask.latents.shape[0])
            start = rows.stop
            try:
                answer = Answer(ask.request, self._expert, compute_us, Tensor.pack(outputs[rows], "float32"))
            except LocalProtocolError as error:  # NaN or infinity, from latents that no extractor makes
                self._refuse(sender, ask.request, Reason.FAILED, refusal_detail(str(error)))
                continue
            self._reply(sender, answer)
        self._metrics.counts["rows_for_peers"] += start
        self._metrics.counts["runs_for_peers"] += 1

    def _refuse(self, sender: Sender, request: int, reason: Reason, detail: str) -> None:
        self._metrics.counts[f"asks_refused_{reason.name.lower()}"] += 1
        self._reply(sender, Refuse(request, reason, detail))
