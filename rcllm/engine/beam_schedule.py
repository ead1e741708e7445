"""Work of a fixed number of steps: which requests are searched together, and how batches overlap.

Knows nothing of models or catalogues, and never imports torch. Every batch runs in a thread from its prompts to its
answers; one forward pass runs at a time, so that the host work of one batch falls under a pass of another. Invariant:
answers come in the order of the requests, whatever the number of threads.
Source: xGR (arXiv 2512.11529), xSchedule.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BeamLimits:
    """Of one batch; a request that exceeds them runs alone."""

    prompt_tokens: int = 2048
    beam_rows: int = 512  # beams of all its requests
    num_overlapped: int = 2  # batches that are under way at a time


@dataclass(frozen=True, slots=True)
class Load:
    """What one request brings."""

    prompt_tokens: int
    beam_rows: int


def beam_batches(loads: Sequence[Load], limits: BeamLimits) -> list[list[int]]:
    """Indices into `loads` in order, in as few batches as the limits allow without changing the order."""
    batches: list[list[int]] = []
    tokens = rows = 0
    for i, load in enumerate(loads):
        tokens, rows = tokens + load.prompt_tokens, rows + load.beam_rows
        if not batches or tokens > limits.prompt_tokens or rows > limits.beam_rows:
            batches.append([])
            tokens, rows = load.prompt_tokens, load.beam_rows
        batches[-1].append(i)
    return batches


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


@dataclass(frozen=True, slots=True)
class Span:
    batch: int
    stage: str
    start_s: float
    end_s: float
    thread: str


@dataclass(slots=True)
class Trace:
    """Which stage of which batch ran when. Threads may add to it at the same time."""

    spans: list[Span] = field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter

    def overlap_s(self, stage: str) -> float:
        """Seconds in which `stage` of a batch ran while another batch was in another stage than waiting."""
        passes = [span for span in self.spans if span.stage == stage]
        others = [span for span in self.spans if span.stage not in (stage, WAITING)]
        return sum(
            max(0.0, min(one.end_s, other.end_s) - max(one.start_s, other.start_s))
            for one in passes
            for other in others
            if one.batch != other.batch
        )

    def write(self, path: Path) -> None:
        """A file that chrome://tracing and Perfetto show: a row per thread, a bar per stage."""
        origin = min((span.start_s for span in self.spans), default=0.0)
        threads = {name: i for i, name in enumerate(dict.fromkeys(span.thread for span in self.spans))}
        events = [
            {
                "name": span.stage,
                "cat": f"batch {span.batch}",
                "ph": "X",
                "ts": (span.start_s - origin) * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "pid": 0,
                "tid": threads[span.thread],
                "args": {"batch": span.batch},
            }
            for span in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


WAITING = "wait"  # the stage in which a batch waits for its turn on the device


class BatchClock:
    """Adds up the stages of one batch, and tells a trace of each."""

    def __init__(self, batch: int, trace: Trace) -> None:
        self._batch, self._trace = batch, trace
        self._start = trace.clock()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Stages do not hold others."""
        start = self._trace.clock()
        try:
            yield
        finally:
            end = self._trace.clock()
            self._stages[name] = self._stages.get(name, 0.0) + (end - start) * 1e3
            self._trace.spans.append(Span(self._batch, name, start, end, threading.current_thread().name))

    def read_ms(self) -> dict[str, float]:
        """Milliseconds per stage so far, and `total` since the batch began."""
        return {**self._stages, "total": (self._trace.clock() - self._start) * 1e3}


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
