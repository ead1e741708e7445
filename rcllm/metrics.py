"""How long stages take: a stopwatch for one batch, and a trace of many.

Knows nothing of what the stages do; the clock is an argument.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rcllm.plain_json import to_json

Clock = Callable[[], float]  # seconds since any one moment
Stage = Callable[[str], AbstractContextManager[None]]  # times what runs inside, by the name of a stage


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of one batch."""

    batch: int
    stage: str
    start_s: float
    end_s: float
    thread: str


@dataclass(slots=True)
class Trace:
    """Which stage of which batch ran when. Threads may add to it at the same time."""

    spans: list[Span] = field(default_factory=list)

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


class PassClock:
    """A clock that stands still while what it times makes way for something else, which it times as well."""

    def __init__(self, clock: Clock) -> None:
        self.steady, self.away_s = clock, 0.0

    def __call__(self) -> float:
        return self.steady() - self.away_s

    @contextmanager
    def away(self) -> Iterator[None]:
        """What runs inside counts for itself, and not for what it interrupts."""
        start = self()
        try:
            yield
        finally:
            self.away_s += self() - start


class Stopwatch:
    """Adds up wall time by stage name; stages do not hold others."""

    def __init__(self, clock: Clock = time.perf_counter, trace: Trace | None = None, batch: int = 0) -> None:
        """`trace`: told of every stage, under the number `batch`."""
        self._clock, self._trace, self._batch = clock, trace, batch
        self._stages: dict[str, float] = {}

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Times what runs inside."""
        return _Timed(self, name)

    def time(self) -> float:
        """By its clock."""
        return self._clock()

    def add(self, name: str, start_s: float) -> None:
        """A stage began then, and ends now."""
        end = self._clock()
        self._stages[name] = self._stages.get(name, 0.0) + (end - start_s) * 1e3
        if self._trace is not None:
            self._trace.spans.append(Span(self._batch, name, start_s, end, threading.current_thread().name))

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds per stage so far."""
        return dict(self._stages)


class _Timed(AbstractContextManager[None]):
    """One stage; a generator in its place would take four times as long."""

    __slots__ = ("_name", "_start_s", "_watch")

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._start_s = self._watch.time()

    def __exit__(self, *_: object) -> None:
        self._watch.add(self._name, self._start_s)
