"""Stage times of one request or batch. Knows nothing of what the stages do; the clock is an argument."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
