"""Work of a fixed number of steps: which requests are searched together, and how batches overlap.

Knows nothing of models or catalogues, and never imports torch. Every batch runs in a thread from its prompts to its
answers; one forward pass runs at a time, so that the host work of one batch falls under a pass of another. Invariant:
answers come in the order of the requests, whatever the number of threads.
Source: xGR (arXiv 2512.11529), xSchedule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rcllm.metrics import WAITING, BatchClock

T = TypeVar("T")


def run_overlapped(jobs: Sequence[Callable[[], T]], num_threads: int) -> list[T]:
    """Results in order; the first error of a job is raised when those that run have ended."""
    if num_threads == 1 or len(jobs) <= 1:
        return [job() for job in jobs]
    with ThreadPoolExecutor(min(num_threads, len(jobs)), "rcllm-beam") as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            return [each.result() for each in running]
        finally:
            for each in running:
                each.cancel()


class Turns:
    """One pass at a time, and the time that is waited for it told apart."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def take(self, clock: BatchClock, stage: str) -> Iterator[None]:
        with clock.stage(WAITING):
            self._lock.acquire()
        try:
            with clock.stage(stage):
                yield
        finally:
            self._lock.release()
