"""The guard: recomputes a sampled share of the served requests in full, and moves reuse levels by what it finds.

A thread and a queue around shadow.py, which does the work, and monitor.py, which decides. Never imports torch.
Invariant: a request path does a coin toss and an append at most; it never waits for the guard.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.fidelity.monitor import GuardEvent, GuardPolicy
from rcllm.fidelity.shadow import GuardCore, GuardStats, Shadow, Shadowing
from rcllm.plain_json import to_json, without_nan

logger = logging.getLogger(__name__)


class Guard:
    """Ask `level` before ranking, tell `observe` after it; a thread does the rest while the guard is entered.

    What it costs others: the engine runs one batch at a time, so a request that arrives during a shadow pass waits for
    the rest of that one pass, at most a full prefill of one prompt. After a pass the guard rests (with a `cpu_share`
    below 1), so a request waits for one at most, and `cpu_share` is the share of time in which it may meet one. With
    `idle` (whether no request runs or waits) passes begin in gaps only, as long as there are any within `patience_s`;
    on an engine that is never idle a guard that only waited would see nothing. Passes of a cheaper level compute and
    publish the item blocks that they miss.

    A trip needs few samples, but samples need time: with passes of c seconds there is one per c / cpu_share at most.
    """

    def __init__(
        self,
        rank: Callable[[RankRequest], RankResponse],
        policy: GuardPolicy,
        shadowing: Shadowing | None = None,
        *,
        defaults: RankOptions | None = None,
        seed: int = 0,
        idle: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_event: Callable[[GuardEvent], None] = lambda event: None,
        complete: Callable[[RankRequest], RankRequest] = lambda request: request,
    ) -> None:
        """`defaults`: options of requests that bring none. `on_event` runs in the guard's thread. `complete`: the
        engine's `prompter.completed`, where the template shows scores that leave out the user's own choices.
        """
        shadowing = shadowing or Shadowing()
        self._core = GuardCore(
            rank,
            policy,
            shadowing,
            defaults=defaults or RankOptions(),
            seed=seed,
            idle=idle,
            clock=clock,
            wall_clock=wall_clock,
            sleep=self._sleep,
            on_event=on_event,
            complete=complete,
        )
        self._waiting: deque[Shadow] = deque(maxlen=shadowing.queue_size)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        assert self._thread is None, "a guard is entered once"
        self._thread = threading.Thread(target=self._work, name="rcllm-guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the pass that is running; what is queued is dropped."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def level(self, options: RankOptions) -> Level:
        """The level to serve requests of this kind with, now. The options' own level does not matter."""
        return self._core.level(options)

    def observe(self, request: RankRequest, response: RankResponse) -> None:
        """Tells of a served request; microseconds, never waits for a pass."""
        with self._changed:
            if shadow := self._core.sample(request, response):
                self._core.counts.num_dropped += len(self._waiting) == self._waiting.maxlen
                self._waiting.append(shadow)
                self._changed.notify()

    def stats(self) -> GuardStats:
        return self._core.stats()

    @property
    def events(self) -> tuple[GuardEvent, ...]:
        """The latest steps, oldest first."""
        return tuple(self._core.events)

    def _work(self) -> None:
        while (shadow := self._next()) is not None:
            try:
                self._core.run(shadow)
            except _ClosedError:
                return
            except Exception:
                self._core.counts.num_failed += 1
                logger.exception("guard: request %s could not be shadowed", shadow.request.request_id)

    def _next(self) -> Shadow | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            return None if self._closing.is_set() else self._waiting.popleft()

    def _sleep(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise _ClosedError


class _ClosedError(Exception):
    """The guard was left while a shadow waited for its turn."""


def append_to(path: Path) -> Callable[[GuardEvent], None]:
    """For `on_event`: writes each event to `path` as a line of JSON."""

    def write(event: GuardEvent) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(without_nan(asdict(event))) + "\n")

    return write
