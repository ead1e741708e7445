"""Which block to give up: GreedyDual-Size (Cao and Irani, 1997), by recompute cost per byte and recency.

A block's priority is `clock + cost / bytes` when it is used; the lowest goes, and the clock rises to it, so what is
not used ages relative to what is. Equal priorities go in order of last use. Never imports torch, never sees a block.
"""

from __future__ import annotations

import heapq
from collections.abc import Container

from rcllm.core.ranking import ContentKey


class GreedyDual:
    """The order of eviction. Stale heap entries are skipped when they come up."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses = 0
        self._current: dict[ContentKey, tuple[float, int]] = {}  # priority, use number
        self._heap: list[tuple[float, int, ContentKey]] = []

    def touch(self, key: ContentKey, cost_per_byte: float) -> None:
        """Called when a block is added and each time it is used."""
        self._uses += 1
        self._current[key] = (self._clock + cost_per_byte, self._uses)
        heapq.heappush(self._heap, (*self._current[key], key))
        if len(self._heap) > 4 * len(self._current) + 64:
            self._heap = [(*rank, k) for k, rank in self._current.items()]
            heapq.heapify(self._heap)

    def forget(self, key: ContentKey) -> None:
        self._current.pop(key, None)

    def pop(self, pinned: Container[ContentKey]) -> ContentKey | None:
        """Removes and returns the next victim, or None when all that is left is pinned."""
        held: list[tuple[float, int, ContentKey]] = []
        victim = None
        while self._heap and victim is None:
            priority, use, key = heapq.heappop(self._heap)
            if self._current.get(key) != (priority, use):
                continue
            if key in pinned:
                held.append((priority, use, key))
                continue
            victim, self._clock = key, priority
            del self._current[key]
        for entry in held:
            heapq.heappush(self._heap, entry)
        return victim

    def check(self, keys: set[ContentKey]) -> None:
        assert self._current.keys() == keys, f"{len(self._current)} keys ranked, {len(keys)} cached"
        ranked = {(priority, use, key) for priority, use, key in self._heap}
        lost = [key for key, rank in self._current.items() if (*rank, key) not in ranked]
        assert not lost, f"{len(lost)} keys cannot be evicted"
