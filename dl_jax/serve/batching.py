"""Calls a model for several requests at once: a thread waits for a large batch, or all requests, or a deadline."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dl_jax.serve.runtime import Model

Answer = tuple[Model, list[np.ndarray]]  # who answered, and the rows of each output


class Job(NamedTuple):
    """A request that waits."""

    inputs: Sequence[np.ndarray]  # [B, ...] each
    arrived: float  # seconds, on the clock
    future: "concurrent.futures.Future[Answer]"

    @property
    def rows(self) -> int:
        return len(self.inputs[0])


def collected(
    first: Job,
    take: Callable[[float], Job | None],
    largest: int,
    wait: float,
    clock: Callable[[], float],
    under_way: Callable[[], int],
) -> tuple[list[Job], Job | None]:
    """The jobs of one call, `first` and those after it, and the job that no longer fits, if there is one.

    A call has `largest` rows at most, unless the first job alone has more. It is due `wait` seconds after the first job
    arrived, or once it has a job for each of the `under_way()` requests that are not answered yet, so that a request
    alone does not wait. What waits already when it is due goes with it. `take(seconds)` gives the next job, or None
    where there is none after so many seconds. `clock` tells the time in seconds.
    """
    jobs, rows = [first], first.rows
    while rows < largest:
        others = under_way() > len(jobs)
        job = take(max(0.0, first.arrived + wait - clock()) if others else 0.0)
        if job is None:
            break
        if rows + job.rows > largest:
            return jobs, job
        jobs.append(job)
        rows += job.rows
    return jobs, None


class Batcher:
    """A thread that answers jobs.

    Args:
      model: gives the model of the next call. All jobs have inputs that any of its models takes.
      largest: rows of a call.
      wait: seconds that a job waits for others.
      seen: is told the rows of each call.
      under_way: how many requests are not answered yet, those that have not submitted their job included.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        largest: int,
        wait: float,
        seen: Callable[[int], None],
        under_way: Callable[[], int],
    ) -> None:
        self._model, self._largest, self._wait, self._seen, self._under_way = model, largest, wait, seen, under_way
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None ends the thread
        self._ended = False
        self._began: float | None = None  # when the call that is made began, by the monotonic clock
        self._thread = threading.Thread(target=self._work, name="predict", daemon=True)
        self._thread.start()

    def submit(self, inputs: Sequence[np.ndarray]) -> "concurrent.futures.Future[Answer]":
        """The answer to come. A future that is cancelled before its call is passed over."""
        job = Job(inputs, time.monotonic(), concurrent.futures.Future())
        self._jobs.put(job)
        return job.future

    def alive(self, within: float) -> bool:
        """Whether the thread works, and is in no call that has taken more than `within` seconds already."""
        began = self._began
        return self._thread.is_alive() and (began is None or time.monotonic() - began <= within)

    def close(self, seconds: float) -> None:
        """Answers what was submitted before, and ends the thread; does not wait longer for a call that hangs."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _take(self, seconds: float) -> Job | None:
        try:
            job = self._jobs.get(timeout=seconds) if seconds else self._jobs.get_nowait()
        except queue.Empty:
            return None
        self._ended = self._ended or job is None
        return job

    def _work(self) -> None:
        held: Job | None = None
        while held or not self._ended:
            first = held or self._jobs.get()
            if first is None:
                return
            jobs, held = collected(first, self._take, self._largest, self._wait, time.monotonic, self._under_way)
            self._began = time.monotonic()
            _answer(self._model(), [job for job in jobs if job.future.set_running_or_notify_cancel()], self._seen)
            self._began = None


def _answer(model: Model, jobs: Sequence[Job], seen: Callable[[int], None]) -> None:
    if not jobs:
        return
    try:
        inputs = [np.concatenate(each) for each in zip(*(job.inputs for job in jobs), strict=True)]
        seen(len(inputs[0]))
        outputs = model.predict(inputs)
    except Exception as error:
        for job in jobs:
            job.future.set_exception(error)
        return
    start = 0
    for job in jobs:
        job.future.set_result((model, [each[start : start + job.rows] for each in outputs]))
        start += job.rows
