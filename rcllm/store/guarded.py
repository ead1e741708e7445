"""A tier that may fail: its errors are counted misses, and after one it is left alone for a while.

Knows nothing of other tiers. Invariant: only `delete_owner` and `close` raise; all else answers as a tier that has
nothing. A tier that is down thus costs one request its timeout, and the others nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.errors import StoreWarning
from rcllm.metrics import Clock
from rcllm.store.contract import Found, Store, Stored, TierStats

T = TypeVar("T")

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


class Breaker:
    """Whether a tier may be asked: not for a while after it failed, and for twice as long after each further failure.

    When a pause is over, one caller tries; the others wait for what becomes of it. Safe to call from several threads.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = 0.0  # 0: it worked when it was last asked
        self._until = 0.0

    def lets_through(self) -> bool:
        with self._lock:
            if not self._pause_s:
                return True
            now = self._clock()
            if now < self._until:
                return False
            self._until = now + self._pause_s
            return True

    def worked(self) -> None:
        with self._lock:
            self._pause_s = 0.0

    def failed(self) -> float:
        """Returns for how many seconds it is left alone from now on."""
        with self._lock:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
            self._until = self._clock() + self._pause_s
            return self._pause_s


class GuardedStore:
    """`store`, which is called `tier` in warnings, and in stats where it cannot tell itself."""

    def __init__(self, store: Store, tier: Source, clock: Clock) -> None:
        self.tier = tier
        self.store = store
        self._breaker = Breaker(clock)
        self._lock = threading.Lock()  # of all below
        self._errors = self._dropped = 0
        self._warned = False
        self._last_stats: Sequence[TierStats] = (TierStats(tier, 0, 0, 0),)

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        wanted = list(keys)
        return (self._asked(lambda: self.store.lookup_many(wanted)) if wanted else None) or {}

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        wanted = list(keys)
        return (self._asked(lambda: self.store.get_many(wanted)) if wanted else None) or {}

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        def put() -> bool:
            self.store.put_many(blocks)
            return True

        if blocks and self._asked(put) is None:
            with self._lock:
                self._dropped += len(blocks)

    def delete_owner(self, owner: str) -> int:
        """Asks also a tier that is left alone, and raises what it raises."""
        try:
            count = self.store.delete_owner(owner)
        except Exception as error:
            self._note(error)
            raise
        self._breaker.worked()
        return count

    def note_corrupt(self) -> None:
        """Counts a block of it that was not whole."""
        with self._lock:
            self._errors += 1

    def stats(self) -> Sequence[TierStats]:
        """What it has, or had when it could last tell; errors, and what was dropped while it was left alone, added."""
        stats = self._asked(self.store.stats)
        with self._lock:
            self._last_stats = stats or self._last_stats
            first, *others = self._last_stats
            first = replace(first, errors=first.errors + self._errors, dropped=first.dropped + self._dropped)
        return (first, *others)

    def close(self) -> None:
        self.store.close()

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """What the tier answers; None where it fails or is left alone."""
        if not self._breaker.lets_through():
            return None
        try:
            answer = ask()
        except Exception as error:
            self._note(error)
            return None
        self._breaker.worked()
        return answer

    def _note(self, error: Exception) -> None:
        pause_s = self._breaker.failed()
        with self._lock:
            self._errors += 1
            first, self._warned = not self._warned, True
        if first:
            # a request or the writer must go on also where warnings are errors
            with suppress(StoreWarning):
                warnings.warn(
                    f"the {self.tier} tier of the store failed ({type(error).__name__}: {error}). The other tiers go "
                    f"on; it is asked again after {pause_s:g} s, then ever more rarely while it fails. Its errors are "
                    "counted in the statistics of the store, and this is said once",
                    StoreWarning,
                    stacklevel=4,
                )
