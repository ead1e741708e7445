"""Who computes: one thread at a time, in the order in which they came.

Knows nothing of what is computed. Invariant: a thread that waits is let in before any that came later, and one whose
wish came true while it waited, or whose waiting was interrupted, leaves the queue at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """A fair lock that can be left when it is no longer needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue = deque[object]()
        self._busy = False

    def acquire(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Waits for this thread's turn; False where `unless` holds first, which then need not be released."""
        me, is_mine = object(), False
        with self._changed:
            self._queue.append(me)
            try:
                self._changed.wait_for(lambda: unless() or (not self._busy and self._queue[0] is me))
                is_mine = not unless()
            finally:  # also where an interrupt ends the waiting
                self._queue.remove(me)
                if is_mine:
                    self._busy = True
                else:
                    self._changed.notify_all()  # somebody else may be first now
        return is_mine

    def acquire_now(self) -> bool:
        """This thread's turn, if nobody has it or waits for it."""
        with self._changed:
            if self._busy or self._queue:
                return False
            self._busy = True
            return True

    def release(self) -> None:
        """Lets the next one in, and everybody look whether what they wait for has come true."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def look(self) -> None:
        """Lets everybody look whether what they wait for has come true, while the turn goes on."""
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else computes inside."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
