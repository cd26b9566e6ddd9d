from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.device.extraction import BATCH_ROWS, MAX_REQUESTS, MAX_ROWS, Extraction, Job
from nmoe_edge.errors import ModelError
from nmoe_edge.models import Models
from nmoe_edge.protocol.familiar import Familiar

NEVER_S = 3600.0
PATIENCE_S = 20.0
"""How long a test waits before it fails."""


class Fake:
    """Models with an extractor that waits for `may_go`; they remember how many rows they were given."""

    familiar = None

    def __init__(self, error=None):
        self.runs = []
        self.experts = []
        self.error = error
        self.began = threading.Semaphore(0)
        self.may_go = threading.Event()
        self.may_go.set()

    def extractor(self, inputs):
        self.runs.append(len(inputs))
        self.began.release()
        assert self.may_go.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return inputs.astype(np.float32)

    def gate(self, latents):
        return latents + np.float32(0.5)

    def expert(self, latents):
        self.experts.append(len(latents))
        return latents * np.float32(2)


class Harness:
    """An Extraction, and the jobs that it has finished."""

    def __init__(self, quick_s=0.0):
        self.woken = threading.Semaphore(0)
        self.extraction = Extraction(self.woken.release, quick_s)
        self.finished = []

    def offer(self, models, rows=1, value=0.0, with_own=False, seconds=NEVER_S):
        job = Job(models, np.full((rows, 3), value, np.float64), time.monotonic() + seconds, with_own)
        return job if self.offered(job, time.monotonic()) else None

    def offered(self, job, now):
        taken = self.extraction.offer(job, now)
        self.extraction.start()
        return taken

    def wait(self, *jobs):
        waited_for = {id(job) for job in jobs}
        while not waited_for <= {id(job) for job in self.finished}:
            assert self.woken.acquire(timeout=PATIENCE_S), "nothing was finished"
            self.finished += self.extraction.done(MAX_REQUESTS)

    def occupied(self):
        """Occupy the thread with a job, so that later jobs are queued. Returns its models and the job."""
        models = Fake()
        models.may_go.clear()
        job = self.offer(models)
        assert models.began.acquire(timeout=PATIENCE_S)
        return models, job


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.extraction.close()


def test_a_job_comes_back_with_latents_and_scores(harness):
    job = harness.offer(Fake(), rows=2, value=3.0)
    harness.wait(job)
    assert job.latents.tolist() == [[3.0] * 3] * 2
    assert job.scores.tolist() == [[3.5] * 3] * 2
    assert (job.own, job.error) == (None, None)


def test_the_tiny_fleets_models_are_run_as_they_are(harness, tiny_fleet):
    models = Models(read_bundle(tiny_fleet / "barn"))
    job = Job(models, np.full((1, 1, 6, 6), 255, np.uint8), time.monotonic() + NEVER_S, True)
    assert harness.offered(job, time.monotonic())
    harness.wait(job)
    assert job.latents == pytest.approx(np.ones((1, 4)), abs=1e-5)
    assert job.own == pytest.approx(np.array([[4.0, 4.25, 4.0]]), abs=1e-5)


def test_distances_are_computed_with_the_own_answers_where_the_bundle_has_statistics(harness):
    models = Fake()
    models.familiar = Familiar(np.eye(3, dtype=np.float32), np.zeros((1, 3), np.float32))
    for with_own in (True, False):
        job = Job(models, np.full((2, 3), 2.0), time.monotonic() + NEVER_S, with_own)
        assert harness.offered(job, time.monotonic())
        harness.wait(job)
        assert (None if job.distances is None else job.distances.tolist()) == ([12.0, 12.0] if with_own else None)


def test_a_finished_job_is_returned_once(harness):
    job = harness.offer(Fake())
    harness.wait(job)
    assert harness.finished == [job]
    assert harness.extraction.done(MAX_REQUESTS) == []


def test_done_returns_at_most_as_many_jobs_as_asked_for(harness):
    occupying, first = harness.occupied()
    models = Fake()
    second, third = harness.offer(models), harness.offer(models)
    assert not harness.extraction.finished
    occupying.may_go.set()
    for _ in range(2):  # one call per batch
        assert harness.woken.acquire(timeout=PATIENCE_S), "nothing was finished"
    assert harness.extraction.finished
    assert harness.extraction.done(2) == [first, second]
    assert harness.extraction.done(2) == [third]
    assert not harness.extraction.finished


def test_queued_jobs_are_run_together_and_split_again(harness):
    occupying, first = harness.occupied()
    models = Fake()
    jobs = [harness.offer(models, rows, value) for rows, value in ((1, 1.0), (3, 2.0), (2, 3.0))]
    occupying.may_go.set()
    harness.wait(first, *jobs)
    assert models.runs == [6]
    assert harness.finished == [first, *jobs]
    assert [(job.latents.shape, set(job.latents.flat)) for job in jobs] == [
        ((1, 3), {1.0}),
        ((3, 3), {2.0}),
        ((2, 3), {3.0}),
    ]


def test_a_batch_is_never_waited_for(harness):
    models = Fake()
    harness.wait(harness.offer(models))
    harness.wait(harness.offer(models))
    assert models.runs == [1, 1]


def test_no_more_rows_than_a_batch_are_run_together(harness):
    occupying, _ = harness.occupied()
    models = Fake()
    jobs = [harness.offer(models, rows) for rows in (BATCH_ROWS // 2, BATCH_ROWS // 2, 1, BATCH_ROWS + 5, 1)]
    occupying.may_go.set()
    harness.wait(*jobs)
    assert models.runs == [BATCH_ROWS, 1, BATCH_ROWS, 5, 1]


def test_a_job_of_more_rows_than_a_batch_is_run_in_pieces_and_joined_in_order(harness):
    models = Fake()
    inputs = np.arange((2 * BATCH_ROWS + 1) * 3, dtype=np.float64).reshape(-1, 3)
    job = Job(models, inputs, time.monotonic() + NEVER_S, True)
    assert harness.offered(job, time.monotonic())
    harness.wait(job)
    assert models.runs == [BATCH_ROWS, BATCH_ROWS, 1]
    assert np.array_equal(job.latents, inputs)
    assert len(job.scores) == len(job.own) == len(inputs)


def test_jobs_of_two_bundles_are_not_run_together(harness):
    occupying, _ = harness.occupied()
    old, new = Fake(), Fake()
    jobs = [harness.offer(old), harness.offer(old), harness.offer(new)]
    occupying.may_go.set()
    harness.wait(*jobs)
    assert (old.runs, new.runs) == ([2], [1])


def test_only_a_job_that_wants_the_own_expert_gets_its_answers(harness):
    occupying, _ = harness.occupied()
    models = Fake()
    without, wanting = harness.offer(models, value=1.0), harness.offer(models, value=2.0, with_own=True)
    occupying.may_go.set()
    harness.wait(without, wanting)
    assert models.experts == [2]
    assert without.own is None
    assert wanting.own.tolist() == [[4.0] * 3]


def test_the_own_expert_is_not_run_unless_a_job_wants_it(harness):
    models = Fake()
    harness.wait(harness.offer(models))
    assert models.experts == []


def test_an_expired_and_a_dropped_job_are_never_run(harness):
    occupying, _ = harness.occupied()
    models = Fake()
    expired = harness.offer(models, value=1.0)
    dropped = harness.offer(models)
    sound = harness.offer(models, value=3.0)
    expired.deadline = time.monotonic() - 1
    dropped.dropped = True
    occupying.may_go.set()
    harness.wait(expired, sound)
    assert models.runs == [1]
    assert not any(job is dropped for job in harness.finished)  # a dropped job is not returned
    assert [(job.latents, job.error) for job in (expired, dropped)] == [(None, None)] * 2
    assert sound.latents.tolist() == [[3.0] * 3]


def test_a_job_past_its_deadline_is_refused(harness):
    assert harness.offer(Fake(), seconds=-1.0) is None


def test_a_job_that_could_not_finish_in_time_is_refused(harness, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nmoe_edge.device.extraction.time", SimpleNamespace(monotonic=lambda: now[0]))
    models, inputs = Fake(), np.zeros((100, 3))
    models.may_go.clear()
    first = Job(models, inputs[:1], NEVER_S, False)
    assert harness.offered(first, 0.0)
    assert models.began.acquire(timeout=PATIENCE_S)
    now[0] = 0.05  # from now on, a row takes this long
    models.may_go.set()
    harness.wait(first)
    # A job that waits for no other is always run: otherwise one slow run would lead to refusing everything.
    models.may_go.clear()
    second = Job(models, inputs[:1], 0.06, False)
    assert harness.offered(second, 0.05)
    assert models.began.acquire(timeout=PATIENCE_S)
    assert not harness.offered(Job(models, inputs, 0.05 + 4.95, False), 0.05)
    assert harness.offered(Job(models, inputs, 0.05 + 5.15, False), 0.05)
    models.may_go.set()


def test_more_jobs_than_the_queue_holds_are_refused(harness):
    occupying, _ = harness.occupied()
    models = Fake()
    jobs = [harness.offer(models) for _ in range(MAX_REQUESTS)]
    assert None not in jobs
    assert harness.offer(models) is None
    occupying.may_go.set()
    harness.wait(*jobs)
    assert harness.offer(models) is not None


def test_more_rows_than_the_queue_holds_are_refused(harness):
    occupying, _ = harness.occupied()
    models = Fake()
    big = harness.offer(models, MAX_ROWS - 1)
    assert harness.offer(models) is None
    occupying.may_go.set()
    harness.wait(big)
    assert harness.offer(models) is not None


def test_an_empty_queue_accepts_a_job_of_more_rows_than_it_holds(harness):
    models = Fake()
    harness.wait(harness.offer(models, MAX_ROWS + 1))
    assert sum(models.runs) == MAX_ROWS + 1


def test_a_failing_model_marks_its_own_jobs_and_no_others(harness):
    occupying, _ = harness.occupied()
    broken, sound = Fake(ModelError("extractor.onnx: broke")), Fake()
    jobs, other = [harness.offer(broken), harness.offer(broken)], harness.offer(sound)
    occupying.may_go.set()
    harness.wait(*jobs, other)
    assert [(job.error, job.latents) for job in jobs] == [("extractor.onnx: broke", None)] * 2
    assert (other.error, other.latents is not None) == (None, True)


def test_inputs_that_fail_do_not_affect_other_jobs_of_the_batch(harness):
    class Picky(Fake):
        """Fails for inputs with a seven."""

        def extractor(self, inputs):
            if (inputs == 7).any():
                raise ModelError("extractor.onnx: no sevens")
            return super().extractor(inputs)

    occupying, _ = harness.occupied()
    picky = Picky()
    before = harness.offer(picky, value=1.0)
    bad = harness.offer(picky, value=7.0)
    behind = harness.offer(picky, value=2.0)
    occupying.may_go.set()
    harness.wait(before, bad, behind)
    assert bad.error == "extractor.onnx: no sevens"
    assert [(job.error, job.latents[0, 0]) for job in (before, behind)] == [(None, 1.0), (None, 2.0)]


@pytest.mark.parametrize("why", ["dropped", "late"])
def test_a_job_that_is_not_needed_any_more_is_not_finished(harness, why):
    held = Fake()
    held.may_go.clear()
    job = harness.offer(held, 10 * BATCH_ROWS)
    assert held.began.acquire(timeout=PATIENCE_S)
    if why == "dropped":
        job.dropped = True
    else:
        job.deadline = time.monotonic()
    held.may_go.set()
    other = harness.offer(Fake())
    harness.wait(other)
    assert held.runs == [BATCH_ROWS]
    assert (job.latents, job.error) == (None, None)


@pytest.mark.parametrize("with_own", [False, True])
def test_nan_from_the_models_is_an_error(harness, with_own):
    job = harness.offer(Fake(), value=np.nan, with_own=with_own)
    harness.wait(job)
    assert "NaN" in job.error
    assert job.latents is None


def test_close_ends_the_thread_after_the_batch_it_is_running():
    harness = Harness()
    occupying, running = harness.occupied()
    models = Fake()
    assert harness.offer(models) is not None
    closing = threading.Thread(target=harness.extraction.close)
    closing.start()
    while not harness.extraction._stopped:
        closing.join(0.001)
    occupying.may_go.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not harness.extraction._thread.is_alive()
    harness.wait(running)
    assert running.latents is not None
    assert models.runs == []


def test_close_ends_an_idle_thread():
    harness = Harness()
    harness.extraction.close()
    assert not harness.extraction._thread.is_alive()


@pytest.fixture
def quick():
    made = Harness(quick_s=float("inf"))
    yield made
    made.extraction.close()


class Traced(Fake):
    """Models that remember which threads ran them."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def gate(self, latents):
        self.threads.append(threading.current_thread().name)
        return super().gate(latents)


def test_a_quick_job_that_is_alone_is_done_by_the_caller(quick):
    models = Traced()
    quick.wait(quick.offer(models))  # by the thread: the time per row is not known yet
    job = quick.offer(models, value=2.0)
    assert quick.extraction.done(1) == [job]
    assert job.latents.tolist() == [[2.0] * 3]
    assert models.threads == ["extraction", threading.current_thread().name]


def test_jobs_offered_together_are_run_together_by_the_thread(quick):
    models = Traced()
    quick.wait(quick.offer(models))
    jobs = [Job(models, np.ones((1, 3)), time.monotonic() + NEVER_S, False) for _ in range(2)]
    for job in jobs:
        assert quick.extraction.offer(job, time.monotonic())
    assert quick.extraction.has_offers
    quick.extraction.start()
    assert not quick.extraction.has_offers
    quick.wait(*jobs)
    assert models.threads == ["extraction"] * 2
    assert models.runs == [1, 2]


def test_a_slow_job_is_done_by_the_thread(harness):
    models = Traced()
    harness.wait(harness.offer(models))
    harness.wait(harness.offer(models))
    assert models.threads == ["extraction"] * 2
