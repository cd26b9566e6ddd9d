"""Computes latents and gate scores of inputs in a thread of its own, so that the device serves meanwhile.

This is the slow part of a device. Queued jobs are run together, but a batch is never waited for. A job that is alone,
and done sooner than the thread could be woken, is done by the caller. The queue is bounded in jobs, rows and time: a
job that could not finish before its deadline is refused when it is offered.
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

MAX_REQUESTS = 256
MAX_ROWS = 4096
"""Rows in the queue; an empty queue accepts a larger job."""
BATCH_ROWS = 32
"""Rows that are run together at most. A larger job is run in pieces: its activations would fill a small board."""
_QUICK_S = 0.0005
"""A job that takes less is done by the caller. Handing it to the thread and back takes half as long, and peers that ask
meanwhile wait no longer than this."""
_SMOOTHING = 8
"""The time per row moves an eighth of the way to each new measurement."""


@dataclass(slots=True, eq=False)
class Job:
    """The inputs of one request, and what is computed from them."""

    models: Models
    inputs: NDArray[Any]
    """(rows, *input)"""
    deadline: float
    with_own: bool
    """Whether to run the device's own expert on every row too: local-first needs its confidence, and the distances."""
    latents: NDArray[np.float32] | None = None
    """(rows, latent)"""
    scores: NDArray[np.float32] | None = None
    """(rows, experts)"""
    own: NDArray[np.float32] | None = None
    """(rows, outputs): the own expert's answers, when `with_own`."""
    distances: NDArray[np.float64] | None = None
    """(rows,): of the latents from familiar ones, when `with_own` and the bundle has their statistics."""
    error: str | None = None
    """What failed. A finished job with neither error nor latents was given up."""
    dropped: bool = False
    """Set when its request is closed: the result is not needed any more."""

    @property
    def given_up(self) -> bool:
        """Whether the job is pointless: dropped, or past its deadline."""
        return self.dropped or time.monotonic() >= self.deadline


class Extraction:
    """The thread and its queue. One thread, the node's, calls all methods."""

    def __init__(self, wake: Callable[[], None], quick_s: float = _QUICK_S) -> None:
        """wake: called by the thread after each batch; quick_s: a shorter job is done without the thread."""
        self._wake = wake
        self._quick_s = quick_s
        self.has_offers = False
        """Whether `start` has something to do."""
        self.finished: deque[Job] = deque()
        """Finished jobs, until `done` returns them."""
        self._changed = threading.Condition()  # guards the queue, the two row figures and _stopped
        self._queue: deque[Job] = deque()
        self._unfinished_rows = 0
        self._row_s = 0.0
        """Seconds per row, smoothed; 0 before the first measurement."""
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="extraction", daemon=True)
        self._thread.start()

    def offer(self, job: Job, now: float) -> bool:
        """Queue a job until `start`. False when the queue is full or the job could not finish before its deadline."""
        rows = len(job.inputs)
        with self._changed:
            full = len(self._queue) >= MAX_REQUESTS or (self._queue and self._unfinished_rows + rows > MAX_ROWS)
            if full or now >= job.deadline:
                return False
            # The time per row is learned by running jobs. So a job that waits for no other is always run: otherwise
            # one slow run would lead to refusing everything.
            ready_at = now + (self._unfinished_rows + rows) * self._row_s
            if self._unfinished_rows and ready_at > job.deadline:
                return False
            self._queue.append(job)
            self._unfinished_rows += rows
        self.has_offers = True
        return True

    def start(self) -> None:
        """Begin what was offered: a quick job that is alone at once, by the caller; the rest in the thread."""
        self.has_offers = False
        with self._changed:
            alone = len(self._queue) == 1 and self._unfinished_rows == len(self._queue[0].inputs)
            is_quick = 0 < self._unfinished_rows * self._row_s < self._quick_s
            if not (alone and is_quick):
                self._changed.notify()
                return
            batch = self._next_batch()
        self._process(batch)

    def done(self, limit: int) -> list[Job]:
        """Take finished jobs, at most `limit`; dropped ones are left out."""
        jobs: list[Job] = []
        while self.finished and len(jobs) < limit:
            job = self.finished.popleft()
            if not job.dropped:
                jobs.append(job)
        return jobs

    def close(self) -> None:
        """Stop the thread after the batch it is running."""
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
                batch = self._next_batch()
            self._process(batch)
            self._wake()

    def _process(self, batch: list[Job]) -> None:
        began = time.monotonic()
        wanted = [job for job in batch if not job.given_up]
        if wanted:
            _compute(wanted)
        took = time.monotonic() - began
        computed_rows = sum([len(job.inputs) for job in wanted if job.latents is not None])  # only these are measured
        with self._changed:
            self._unfinished_rows -= sum([len(job.inputs) for job in batch])
            if computed_rows:
                row_s = took / computed_rows
                self._row_s += (row_s - self._row_s) / (_SMOOTHING if self._row_s else 1)
        self.finished.extend(batch)

    def _next_batch(self) -> list[Job]:
        """Take the first job of the queue and those behind it that can be run with it."""
        batch = [self._queue.popleft()]
        rows = len(batch[0].inputs)
        while self._queue and self._queue[0].models is batch[0].models:
            rows += len(self._queue[0].inputs)
            if rows > BATCH_ROWS:
                break
            batch.append(self._queue.popleft())
        return batch


def _compute(jobs: list[Job]) -> None:
    """Run the jobs together; if that fails, one by one, so that only the job with bad inputs gets the error."""
    try:
        _compute_together(jobs)
    except Exception as error:  # noqa: BLE001  # out of memory, for example: the thread must survive any inputs
        if len(jobs) > 1:
            for job in jobs:
                _compute([job])
        else:
            jobs[0].error = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _compute_together(jobs: list[Job]) -> None:
    models = jobs[0].models
    inputs = np.concatenate([job.inputs for job in jobs]) if len(jobs) > 1 else jobs[0].inputs
    pieces = []
    for start in range(0, len(inputs), BATCH_ROWS):
        if start and all(job.given_up for job in jobs):
            return
        pieces.append(models.extractor(inputs[start : start + BATCH_ROWS]))
    latents = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    scores = models.gate(latents)
    with_own = any(job.with_own for job in jobs)
    own = models.expert(latents) if with_own else None
    distances = models.familiar.distances(latents) if with_own and models.familiar is not None else None
    start = 0
    for job in jobs:
        rows = slice(start, start + len(job.inputs))
        start = rows.stop
        _fill_in(job, latents[rows], scores[rows], own[rows] if own is not None and job.with_own else None)
        job.distances = distances[rows] if distances is not None and job.with_own else None


def _fill_in(
    job: Job, latents: NDArray[np.float32], scores: NDArray[np.float32], own: NDArray[np.float32] | None
) -> None:
    """Store one job's results, or an error when they contain NaN or infinity."""
    finite = np.isfinite(latents).all() and np.isfinite(scores).all()
    if own is not None:
        finite = finite and np.isfinite(own).all()
    if not finite:
        job.error = "the models give NaN or infinity for these inputs"
        return
    job.latents = latents
    job.scores = scores
    job.own = own
