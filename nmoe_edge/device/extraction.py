"""Inputs -> latents and scores, in a thread of its own: the slow part of a device, beside which it goes on answering.

What is queued is run together; a batch is never waited for. A request that is alone and quicker done than handed over
and fetched is done on the spot. Bounded in rows and in time: what could not be done before its deadline is refused when
it comes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmoe_edge.errors import ModelError
from nmoe_edge.models import Models

MOST_REQUESTS = 256
MOST_ROWS = 4096
BATCH_ROWS = 32
"""Run together at most; a request of more is run in pieces of so many, or its activations would fill a small board."""
_QUICK_S = 0.0005
"""Handing a request to the thread and back takes half as long; peers that ask meanwhile wait no longer than this."""


@dataclass(slots=True, eq=False)
class Job:
    """A request's inputs, and what becomes of them."""

    models: Models
    inputs: NDArray[Any]
    deadline: float
    own_too: bool
    """Whether the own expert's answer is wanted for every row: local first asks it before anybody."""
    latents: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    own: NDArray[np.float32] | None = None
    error: str | None = None
    """What broke; a job with neither this nor latents was given up."""
    dropped: bool = False
    """Nobody waits for it any more."""

    @property
    def given_up(self) -> bool:
        """Whether what is not done by now is not worth doing."""
        return self.dropped or time.monotonic() >= self.deadline


class Extraction:
    """The thread and its queue."""

    def __init__(self, wake: Callable[[], None], quick_s: float = _QUICK_S) -> None:
        """wake: called when the thread has done something; quick_s: what takes no longer is done without it."""
        self._wake, self._quick_s = wake, quick_s
        self._queue: deque[Job] = deque()
        self.finished: deque[Job] = deque()
        """What `done` takes from."""
        self._changed = threading.Condition()
        self._rows, self._stopped = 0, False
        self.offered = False
        """Whether `start` has something to do."""
        self._row_s = 0.0
        """What a row takes, smoothed."""
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)
        self._thread.start()

    def offer(self, job: Job, now: float) -> bool:
        """Take a job on, for when `start` is called; False when it could not be done in time, or the queue is full."""
        rows = len(job.inputs)
        with self._changed:
            full = len(self._queue) >= MOST_REQUESTS or (self._queue and self._rows + rows > MOST_ROWS)
            # What a row takes is learnt by running some: with nothing to wait for, a job is run whatever was learnt.
            if full or now >= job.deadline or (self._rows and now + (self._rows + rows) * self._row_s > job.deadline):
                return False
            self._queue.append(job)
            self._rows += rows
        self.offered = True
        return True

    def start(self) -> None:
        """Have done what was offered: here where that is quicker, else by the thread."""
        self.offered = False
        with self._changed:
            alone = len(self._queue) == 1 and self._rows == len(self._queue[0].inputs)
            if not (alone and 0 < self._rows * self._row_s < self._quick_s):
                self._changed.notify()
                return
            batch = self._batch()
        self._do(batch)

    def done(self, most: int) -> list[Job]:
        """What is finished and still waited for; no more than so many."""
        found: list[Job] = []
        while self.finished and len(found) < most:
            job = self.finished.popleft()
            if not job.dropped:
                found.append(job)
        return found

    def close(self) -> None:
        """Stop after what is being run."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                batch = self._batch()
            self._do(batch)
            self._wake()

    def _do(self, batch: list[Job]) -> None:
        began = time.monotonic()
        ready = [job for job in batch if not job.given_up]
        if ready:
            _compute(ready)
        took = time.monotonic() - began
        rows = sum([len(job.inputs) for job in ready if job.latents is not None])  # what was given up teaches nothing
        with self._changed:
            self._rows -= sum([len(job.inputs) for job in batch])
            if rows:
                self._row_s += (took / rows - self._row_s) / (8 if self._row_s else 1)
        self.finished.extend(batch)

    def _batch(self) -> list[Job]:
        """The first in the queue, and those behind it that can be run with it."""
        batch = [self._queue.popleft()]
        rows = len(batch[0].inputs)
        while self._queue and self._queue[0].models is batch[0].models:
            rows += len(self._queue[0].inputs)
            if rows > BATCH_ROWS:
                break
            batch.append(self._queue.popleft())
        return batch


def _compute(jobs: list[Job]) -> None:
    """Latents and scores of each, or what broke; one that breaks takes no other with it."""
    try:
        _computed(jobs)
    except Exception as error:  # noqa: BLE001  # no memory, say: this thread must outlive whatever inputs do
        if len(jobs) > 1:
            for job in jobs:
                _compute([job])
        else:
            jobs[0].error = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _computed(jobs: list[Job]) -> None:
    models = jobs[0].models
    inputs = np.concatenate([job.inputs for job in jobs]) if len(jobs) > 1 else jobs[0].inputs
    pieces = []
    for at in range(0, len(inputs), BATCH_ROWS):
        if at and all(job.given_up for job in jobs):
            return
        pieces.append(models.extractor(inputs[at : at + BATCH_ROWS]))
    latents = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    scores = models.gate(latents)
    own = models.expert(latents) if any(job.own_too for job in jobs) else None
    start = 0
    for job in jobs:
        rows = slice(start, start + len(job.inputs))
        start = rows.stop
        found = [array[rows] for array in (latents, scores, *([own] if own is not None and job.own_too else []))]
        if not all(np.isfinite(array).all() for array in found):
            job.error = "the models make NaN or infinity of these inputs"
            continue
        job.latents, job.scores, job.own = (*found, None)[:3]
