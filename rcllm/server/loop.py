"""One thread that runs the passes of engines while any request waits, then what is for idle time, and else sleeps.

Knows nothing of HTTP or of asyncio. Invariant: a mistake in a pass never ends the thread in silence: it is logged and
counted, and `on_failure` is told, so that nobody waits for an answer that will not come.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from rcllm.words import without_words

logger = logging.getLogger(__name__)
_REST_S = 0.05  # after a mistake, so that one that repeats does not take a core
_IDLE_REST_S = 60.0  # after one in idle time, which nobody waits for


class Turning(Protocol):
    """What is driven: an `Engine`."""

    def turn(self) -> bool:
        """One pass; False where nobody waits."""


class Idle(Protocol):
    """What is done where nothing else waits."""

    def turn(self) -> bool:
        """Whether the engine has work now."""

    @property
    def due_s(self) -> float | None:
        """In how many seconds there will be something to do; None: not before somebody asks."""


class Careful:
    """An `Idle` whose mistakes are logged and counted, and end nothing else."""

    def __init__(self, idle: Idle | None) -> None:
        self._idle = idle
        self._is_resting = False
        self.failures = 0

    def turn(self) -> bool:
        self._is_resting = False
        try:
            return self._idle is not None and self._idle.turn()
        except Exception as error:
            self.failures += 1
            self._is_resting = True
            logger.error("a turn in idle time ended by a mistake", exc_info=without_words(error))
            return False

    @property
    def due_s(self) -> float | None:
        if self._is_resting:
            return _IDLE_REST_S
        return None if self._idle is None else self._idle.due_s


class Loop:
    """`start`, then `wake` after whatever may need a pass; `stop` at the end."""

    def __init__(
        self, engines: Sequence[Turning], on_failure: Callable[[Exception], None], idle: Idle | None = None
    ) -> None:
        """`idle`: has its turn where no engine has work."""
        self._engines, self._on_failure, self._idle = tuple(engines), on_failure, Careful(idle)
        self._changed = threading.Condition()
        self._awake = self._ending = False
        self._thread = threading.Thread(target=self._run, name="rcllm-loop", daemon=True)
        self.failures = 0

    @property
    def idle_failures(self) -> int:
        """Mistakes of what is done in idle time."""
        return self._idle.failures

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the pass that runs has ended; what still waits is not computed."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Says that a request was submitted or withdrawn."""
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._awake or self._ending, self._idle.due_s)
                if self._ending:
                    return
                self._awake = False
            try:
                turns = [engine.turn() for engine in self._engines]
            except Exception as error:
                self._fail(error)
                turns = [True]
            if any(turns) or self._idle.turn():
                self.wake()

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        logger.error("a pass ended by a mistake", exc_info=without_words(error))
        self._on_failure(error)
        with self._changed:
            self._changed.wait_for(lambda: self._ending, _REST_S)
