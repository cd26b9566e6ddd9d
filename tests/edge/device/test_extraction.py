from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nmoe_edge.bundle.folder import read_bundle
from nmoe_edge.device.extraction import BATCH_ROWS, MOST_REQUESTS, MOST_ROWS, Extraction, Job
from nmoe_edge.errors import ModelError
from nmoe_edge.models import Models

NEVER_S = 3600.0
PATIENCE_S = 20.0
"""How long a test waits before it says that nothing comes."""


class Fake:
    """Models that wait at a gate until they are let through, and remember how many rows they were given."""

    def __init__(self, error=None):
        self.runs, self.experts, self.error = [], [], error
        self.began, self.may_go = threading.Semaphore(0), threading.Event()
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


class Room:
    """A front whose finished jobs are waited for."""

    def __init__(self, quick_s=0.0):
        self.woken = threading.Semaphore(0)
        self.front = Extraction(self.woken.release, quick_s)
        self.finished = []

    def offer(self, models, rows=1, value=0.0, own_too=False, seconds=NEVER_S):
        job = Job(models, np.full((rows, 3), value, np.float64), time.monotonic() + seconds, own_too)
        return job if self.offered(job, time.monotonic()) else None

    def offered(self, job, now):
        taken = self.front.offer(job, now)
        self.front.start()
        return taken

    def wait(self, *jobs):
        while not all(any(job is one for one in self.finished) for job in jobs):
            assert self.woken.acquire(timeout=PATIENCE_S), "it did not come"
            self.finished += self.front.done(MOST_REQUESTS)

    def held(self):
        """Models in whose hands the thread is, so that what is offered now is queued."""
        models = Fake()
        models.may_go.clear()
        job = self.offer(models)
        assert models.began.acquire(timeout=PATIENCE_S)
        return models, job


@pytest.fixture
def room():
    made = Room()
    yield made
    made.front.close()


def test_a_job_comes_back_with_latents_and_scores(room):
    job = room.offer(Fake(), rows=2, value=3.0)
    room.wait(job)
    assert job.latents.tolist() == [[3.0] * 3] * 2
    assert job.scores.tolist() == [[3.5] * 3] * 2
    assert (job.own, job.error) == (None, None)


def test_the_tiny_fleets_models_are_run_as_they_are(room, tiny_fleet):
    models = Models(read_bundle(tiny_fleet / "barn"))
    job = Job(models, np.full((1, 1, 6, 6), 255, np.uint8), time.monotonic() + NEVER_S, True)
    assert room.offered(job, time.monotonic())
    room.wait(job)
    assert job.latents == pytest.approx(np.ones((1, 4)), abs=1e-5)
    assert job.own == pytest.approx(np.array([[4.0, 4.25, 4.0]]), abs=1e-5)


def test_what_is_done_is_told_once(room):
    job = room.offer(Fake())
    room.wait(job)
    assert room.finished == [job]
    assert room.front.done(MOST_REQUESTS) == []


def test_no_more_is_taken_at_once_than_is_wanted(room):
    held, first = room.held()
    models = Fake()
    second, third = room.offer(models), room.offer(models)
    assert not room.front.finished
    held.may_go.set()
    for _ in range(2):  # two batches: two calls
        assert room.woken.acquire(timeout=PATIENCE_S), "it did not come"
    assert room.front.finished
    assert room.front.done(2) == [first, second]
    assert room.front.done(2) == [third]
    assert not room.front.finished


def test_what_is_queued_is_run_together_and_split_rightly(room):
    held, first = room.held()
    models = Fake()
    jobs = [room.offer(models, rows, value) for rows, value in ((1, 1.0), (3, 2.0), (2, 3.0))]
    held.may_go.set()
    room.wait(first, *jobs)
    assert models.runs == [6]
    assert room.finished == [first, *jobs]
    assert [(job.latents.shape, set(job.latents.flat)) for job in jobs] == [
        ((1, 3), {1.0}),
        ((3, 3), {2.0}),
        ((2, 3), {3.0}),
    ]


def test_a_batch_is_never_waited_for(room):
    models = Fake()
    room.wait(room.offer(models))
    room.wait(room.offer(models))
    assert models.runs == [1, 1]


def test_no_more_rows_than_a_batch_are_run_together(room):
    held, _ = room.held()
    models = Fake()
    jobs = [room.offer(models, rows) for rows in (BATCH_ROWS // 2, BATCH_ROWS // 2, 1, BATCH_ROWS + 5, 1)]
    held.may_go.set()
    room.wait(*jobs)
    assert models.runs == [BATCH_ROWS, 1, BATCH_ROWS, 5, 1]


def test_a_request_of_more_rows_than_a_batch_is_run_in_pieces_and_put_together_in_order(room):
    models = Fake()
    inputs = np.arange((2 * BATCH_ROWS + 1) * 3, dtype=np.float64).reshape(-1, 3)
    job = Job(models, inputs, time.monotonic() + NEVER_S, True)
    assert room.offered(job, time.monotonic())
    room.wait(job)
    assert models.runs == [BATCH_ROWS, BATCH_ROWS, 1]
    assert np.array_equal(job.latents, inputs)
    assert len(job.scores) == len(job.own) == len(inputs)


def test_jobs_of_two_bundles_are_not_run_together(room):
    held, _ = room.held()
    old, new = Fake(), Fake()
    jobs = [room.offer(old), room.offer(old), room.offer(new)]
    held.may_go.set()
    room.wait(*jobs)
    assert (old.runs, new.runs) == ([2], [1])


def test_the_own_expert_answers_those_who_want_it_alone(room):
    held, _ = room.held()
    models = Fake()
    without, wanting = room.offer(models, value=1.0), room.offer(models, value=2.0, own_too=True)
    held.may_go.set()
    room.wait(without, wanting)
    assert models.experts == [2]
    assert without.own is None
    assert wanting.own.tolist() == [[4.0] * 3]


def test_where_nobody_wants_it_the_own_expert_is_not_run(room):
    models = Fake()
    room.wait(room.offer(models))
    assert models.experts == []


def test_an_expired_and_a_dropped_job_are_never_run(room):
    held, _ = room.held()
    models = Fake()
    expired, dropped, sound = room.offer(models, value=1.0), room.offer(models), room.offer(models, value=3.0)
    expired.deadline = time.monotonic() - 1
    dropped.dropped = True
    held.may_go.set()
    room.wait(expired, sound)
    assert models.runs == [1]
    assert not any(job is dropped for job in room.finished)  # nobody waits for it: it is let go
    assert [(job.latents, job.error) for job in (expired, dropped)] == [(None, None)] * 2
    assert sound.latents.tolist() == [[3.0] * 3]


def test_a_job_whose_deadline_is_past_is_refused(room):
    assert room.offer(Fake(), seconds=-1.0) is None


def test_a_job_that_could_not_be_done_in_time_is_refused(room, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nmoe_edge.device.extraction.time", SimpleNamespace(monotonic=lambda: now[0]))
    models, inputs = Fake(), np.zeros((100, 3))
    models.may_go.clear()
    first = Job(models, inputs[:1], NEVER_S, False)
    assert room.offered(first, 0.0)
    assert models.began.acquire(timeout=PATIENCE_S)
    now[0] = 0.05  # which is what a row takes, from here on
    models.may_go.set()
    room.wait(first)
    # With nothing to wait for a job is run whatever was learnt: else one slow run would end them all.
    models.may_go.clear()
    second = Job(models, inputs[:1], 0.06, False)
    assert room.offered(second, 0.05)
    assert models.began.acquire(timeout=PATIENCE_S)
    assert not room.offered(Job(models, inputs, 0.05 + 4.95, False), 0.05)
    assert room.offered(Job(models, inputs, 0.05 + 5.15, False), 0.05)
    models.may_go.set()


def test_more_requests_than_the_queue_holds_are_refused(room):
    held, _ = room.held()
    models = Fake()
    jobs = [room.offer(models) for _ in range(MOST_REQUESTS)]
    assert None not in jobs
    assert room.offer(models) is None
    held.may_go.set()
    room.wait(*jobs)
    assert room.offer(models) is not None


def test_more_rows_than_the_queue_holds_are_refused(room):
    held, _ = room.held()
    models = Fake()
    big = room.offer(models, MOST_ROWS - 1)
    assert room.offer(models) is None
    held.may_go.set()
    room.wait(big)
    assert room.offer(models) is not None


def test_a_request_of_more_rows_than_the_queue_holds_is_taken_by_an_empty_one(room):
    models = Fake()
    room.wait(room.offer(models, MOST_ROWS + 1))
    assert sum(models.runs) == MOST_ROWS + 1


def test_a_model_that_breaks_marks_every_job_of_the_batch_and_no_other(room):
    held, _ = room.held()
    broken, sound = Fake(ModelError("extractor.onnx: broke")), Fake()
    jobs, other = [room.offer(broken), room.offer(broken)], room.offer(sound)
    held.may_go.set()
    room.wait(*jobs, other)
    assert [(job.error, job.latents) for job in jobs] == [("extractor.onnx: broke", None)] * 2
    assert (other.error, other.latents is not None) == (None, True)


def test_inputs_that_break_a_model_take_no_others_with_them(room):
    class Picky(Fake):
        """Does not bear sevens."""

        def extractor(self, inputs):
            if (inputs == 7).any():
                raise ModelError("extractor.onnx: no sevens")
            return super().extractor(inputs)

    held, _ = room.held()
    picky = Picky()
    before, bad, behind = (room.offer(picky, value=value) for value in (1.0, 7.0, 2.0))
    held.may_go.set()
    room.wait(before, bad, behind)
    assert bad.error == "extractor.onnx: no sevens"
    assert [(job.error, job.latents[0, 0]) for job in (before, behind)] == [(None, 1.0), (None, 2.0)]


@pytest.mark.parametrize("why", ["dropped", "late"])
def test_what_nobody_waits_for_any_more_is_not_finished(room, why):
    held = Fake()
    held.may_go.clear()
    job = room.offer(held, 10 * BATCH_ROWS)
    assert held.began.acquire(timeout=PATIENCE_S)
    if why == "dropped":
        job.dropped = True
    else:
        job.deadline = time.monotonic()
    held.may_go.set()
    other = room.offer(Fake())
    room.wait(other)
    assert held.runs == [BATCH_ROWS]
    assert (job.latents, job.error) == (None, None)


@pytest.mark.parametrize("own_too", [False, True])
def test_what_the_models_make_no_numbers_of_is_an_error(room, own_too):
    job = room.offer(Fake(), value=np.nan, own_too=own_too)
    room.wait(job)
    assert "NaN" in job.error
    assert job.latents is None


def test_closing_ends_the_thread_after_what_is_being_run():
    room = Room()
    held, running = room.held()
    models = Fake()
    assert room.offer(models) is not None
    closing = threading.Thread(target=room.front.close)
    closing.start()
    while not room.front._stopped:
        closing.join(0.001)
    held.may_go.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not room.front._thread.is_alive()
    room.wait(running)
    assert running.latents is not None
    assert models.runs == []


def test_closing_an_idle_front_ends_it_too():
    room = Room()
    room.front.close()
    assert not room.front._thread.is_alive()


@pytest.fixture
def quick():
    made = Room(quick_s=float("inf"))
    yield made
    made.front.close()


class Traced(Fake):
    """Models that remember which thread ran them."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def gate(self, latents):
        self.threads.append(threading.current_thread().name)
        return super().gate(latents)


def test_a_quick_request_that_is_alone_is_done_on_the_spot(quick):
    models = Traced()
    quick.wait(quick.offer(models))  # by the thread: what a row takes is not known yet
    job = quick.offer(models, value=2.0)
    assert quick.front.done(1) == [job]
    assert job.latents.tolist() == [[2.0] * 3]
    assert models.threads == ["front", threading.current_thread().name]


def test_requests_that_come_together_go_to_the_thread_and_are_run_together(quick):
    models = Traced()
    quick.wait(quick.offer(models))
    jobs = [Job(models, np.ones((1, 3)), time.monotonic() + NEVER_S, False) for _ in range(2)]
    for job in jobs:
        assert quick.front.offer(job, time.monotonic())
    assert quick.front.offered
    quick.front.start()
    assert not quick.front.offered
    quick.wait(*jobs)
    assert models.threads == ["front"] * 2
    assert models.runs == [1, 2]


def test_what_takes_long_goes_to_the_thread(room):
    models = Traced()
    room.wait(room.offer(models))
    room.wait(room.offer(models))
    assert models.threads == ["front"] * 2
