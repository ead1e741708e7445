"""Which block to give up: GreedyDual-Size (Cao and Irani, 1997), by recompute cost per byte and recency.

A block's priority is `clock + cost / bytes` when it is used; the lowest goes, and the clock rises to it, so what is
not used ages relative to what is. Equal priorities go in order of last use. Never imports torch, never sees a block.
"""

from __future__ import annotations

import heapq
from collections.abc import Container

from rcllm.core.ranking import ContentKey


class GreedyDual:
    """The order of eviction. A use raises a rank and leaves the heap alone, for uses are many and victims few: an entry
    that comes up is put back where its rank has risen, skipped where its key is gone, laid aside where it is pinned.

    Invariant: every key that is not aside has an entry that is no higher than its rank.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses = 0
        self._current: dict[ContentKey, tuple[float, int]] = {}  # priority, use number
        self._heap: list[tuple[tuple[float, int], ContentKey]] = []
        self._aside: set[ContentKey] = set()  # they were pinned when they came up

    def touch(self, key: ContentKey, cost_per_byte: float) -> None:
        """Called when a block is added and each time it is used."""
        self._uses += 1
        rank, before = (self._clock + cost_per_byte, self._uses), self._current.get(key)
        self._current[key] = rank
        if before is None or rank < before:
            self._push(key)

    def _push(self, key: ContentKey) -> None:
        heapq.heappush(self._heap, (self._current[key], key))
        if len(self._heap) > 4 * len(self._current) + 64:  # most are of keys that are gone
            self._heap = [(rank, k) for k, rank in self._current.items() if k not in self._aside]
            heapq.heapify(self._heap)

    def forget(self, key: ContentKey) -> None:
        self._current.pop(key, None)
        self._aside.discard(key)

    def release(self, key: ContentKey) -> None:
        """Called when a key is pinned no more: it may go again, in the order in which it would have."""
        if key in self._aside:
            self._aside.discard(key)
            self._push(key)

    def pop(self, pinned: Container[ContentKey]) -> ContentKey | None:
        """Removes and returns the next victim, or None when all that is left is pinned.

        What is pinned is passed over once, until `release`: with many pins, looking at each again would cost most.
        """
        while self._heap:
            rank, key = heapq.heappop(self._heap)
            now = self._current.get(key)
            if now is None:
                continue
            if key in pinned:
                self._aside.add(key)
            elif now != rank:
                self._push(key)
            else:
                self._clock = rank[0]
                del self._current[key]
                return key
        return None

    def check(self, keys: set[ContentKey]) -> None:
        assert self._current.keys() == keys, f"{len(self._current)} keys ranked, {len(keys)} cached"
        entries = {key: rank for rank, key in sorted(self._heap, reverse=True)}  # the lowest of each key
        ranked = {key: rank for key, rank in self._current.items() if key not in self._aside}
        lost = [key for key, rank in ranked.items() if key not in entries or entries[key] > rank]
        assert self._aside <= self._current.keys(), "what was laid aside is ranked"
        assert not lost, f"{len(lost)} keys cannot be evicted"
