"""A tier that fails on purpose: for tests, and for drills of those who run a service.

Wraps any keeper. Knows nothing of blocks but their bytes. Invariant: without faults it answers as the keeper does; with
them, whatever it returns was put, or differs from it so that the checksum of a sealed block shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Found, Store, Stored, TierStats


class InjectedError(OSError):
    """What a call raises that is to fail."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How often each fault happens: shares between 0 and 1."""

    failed: float = 0.0  # of calls, those that raise; half of them after they did their work
    slow: float = 0.0  # of calls, those that take `slow_s` longer
    slow_s: float = 0.05
    dropped: float = 0.0  # of blocks that are put, those that it forgets to take: what it had under the key stays
    lost: float = 0.0  # of blocks that it has, those that it does not find at one call
    flipped: float = 0.0  # of blocks that are read, those in which one bit is wrong
    truncated: float = 0.0  # of blocks that are read, those whose end is missing


class FaultyStore:
    """`store` with `faults` that `rng` draws, which several threads may share; `sleep` is told how many seconds."""

    def __init__(self, store: Store, faults: Faults, rng: Random, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store = store
        self.faults = faults
        self._rng = rng
        self._sleep = sleep

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        with self._trouble():
            found = self.store.lookup_many(keys)
            return {key: each for key, each in found.items() if not self._happens(self.faults.lost)}

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        with self._trouble():
            found = self.store.get_many(keys)
            return {key: self._damaged(block) for key, block in found.items() if not self._happens(self.faults.lost)}

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        with self._trouble():
            self.store.put_many({key: block for key, block in blocks.items() if not self._happens(self.faults.dropped)})

    def delete_owner(self, owner: str) -> int:
        with self._trouble():
            return self.store.delete_owner(owner)

    def stats(self) -> Sequence[TierStats]:
        with self._trouble():
            return self.store.stats()

    def close(self) -> None:
        """Never fails on purpose."""
        self.store.close()

    def _happens(self, share: float) -> bool:
        return self._rng.random() < share

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """A call that may be slow, and may fail before or after it did its work."""
        if self._happens(self.faults.slow):
            self._sleep(self.faults.slow_s)
        fails, late = self._happens(self.faults.failed), self._happens(0.5)
        if fails and not late:
            raise InjectedError("injected: this call fails, and did nothing")
        yield
        if fails:
            raise InjectedError("injected: this call did its work, and fails")

    def _damaged(self, block: Stored) -> Stored:
        if block.num_bytes and self._happens(self.faults.flipped):
            data = bytearray(block.data)
            bit = self._rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            return replace(block, data=memoryview(data), checked=False)
        if block.num_bytes and self._happens(self.faults.truncated):
            return replace(block, data=block.data[: self._rng.randrange(block.num_bytes)], checked=False)
        return block
