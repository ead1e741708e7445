"""Stage times of one request or batch. Knows nothing of what the stages do; the clock is an argument."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rcllm.plain_json import to_json


class Stopwatch:
    """Adds up wall time by stage name; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._stages[name] = self._stages.get(name, 0.0) + (self._clock() - start) * 1e3

    def read_ms(self) -> dict[str, float]:
        """Milliseconds per stage so far, and `total` since the stopwatch was made."""
        return {**self._stages, "total": (self._clock() - self._start) * 1e3}


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
        path.write_text(to_json({"traceEvents": events}), encoding="utf-8")


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
