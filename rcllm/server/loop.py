"""One thread that runs the passes of engines while any request waits, and sleeps otherwise.

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


class Turning(Protocol):
    """What is driven: an `Engine`."""

    def turn(self) -> bool:
        """One pass; False where nobody waits."""


class Loop:
    """`start`, then `wake` after whatever may need a pass; `stop` at the end."""

    def __init__(self, engines: Sequence[Turning], on_failure: Callable[[Exception], None]) -> None:
        self._engines, self._on_failure = tuple(engines), on_failure
        self._changed = threading.Condition()
        self._awake = self._ending = False
        self._thread = threading.Thread(target=self._run, name="rcllm-loop", daemon=True)
        self.failures = 0

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
                self._changed.wait_for(lambda: self._awake or self._ending)
                if self._ending:
                    return
                self._awake = False
            try:
                busy = [engine.turn() for engine in self._engines]
            except Exception as error:
                self._fail(error)
                busy = [True]
            if any(busy):
                self.wake()

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        logger.error("a pass ended by a mistake", exc_info=without_words(error))
        self._on_failure(error)
        with self._changed:
            self._changed.wait_for(lambda: self._ending, _REST_S)
