"""Host memory as a tier, within a byte budget: each block in memory of its own, or all of them in an arena.

Knows nothing of tensors. Invariant: index and blocks name the same keys.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence

from rcllm.core.ranking import ContentKey
from rcllm.store.arena import Arena
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.index import Entry, Index

# An arena is fuller than seven eighths only while blocks come and go: what makes way is free again when its readers
# and writers have ended, and runs of pages leave fragments between them.
_SLACK = 8
_INSIST = 4  # times the bytes of a block, that may make way for it where it finds no run


class MemoryStore:
    """At most `budget` bytes of blocks; those that cost least per byte to compute again go first."""

    def __init__(self, budget: int, arena: Arena | None = None) -> None:
        """arena: where blocks lie; what it has beyond the budget is slack."""
        self._index = Index(budget)
        self._arena = arena
        self._blocks: dict[ContentKey, Stored] = {}
        self._dropped = 0
        self._lock = threading.Lock()

    @classmethod
    def within(cls, arena: Arena) -> MemoryStore:
        """All that an arena can well hold."""
        return cls(arena.num_bytes - arena.num_bytes // _SLACK, arena)

    @property
    def budget(self) -> int:
        return self._index.budget

    @property
    def unfilled_bytes(self) -> int:
        """How much more memory blocks may take: none where all of it was taken as an arena."""
        return self._index.budget - self._index.used if self._arena is None else 0

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        with self._lock:
            sizes = {key: self._blocks[key].num_bytes for key in keys if key in self._blocks}
        return {key: Found("host", size) for key, size in sizes.items()}

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        with self._lock:
            found = {key: self._blocks[key] for key in keys if key in self._blocks}
            for key in found:
                self._index.touch(key)
            return found

    def room_for(self, num_bytes: int) -> memoryview | None:
        """Bytes of the arena, which a block can be put in without a copy; None where there are none."""
        with self._lock:
            return None if self._arena is None else self._arena.take(num_bytes)

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        self.put_evicting(blocks)

    def put_evicting(self, blocks: Mapping[ContentKey, Stored]) -> Mapping[ContentKey, Stored]:
        """The same; returns the blocks that had to make way, which a farther tier may want."""
        given = blocks if self._arena else {key: block.owned() for key, block in blocks.items()}
        evicted: dict[ContentKey, Stored] = {}
        with self._lock:
            for key in given.keys() & self._blocks.keys():
                self._drop(key)
            for key, block in given.items():
                if block.num_bytes > self._index.budget:
                    self._dropped += 1
                    continue
                evicted |= {victim: self._blocks.pop(victim) for victim in self._index.make_room(block.num_bytes)}
                if (placed := self._placed(block)) is None:
                    self._dropped += 1
                    continue
                self._index.add(key, Entry(block.num_bytes, block.cost, block.owner))
                self._blocks[key] = placed
        return evicted

    def _placed(self, block: Stored) -> Stored | None:
        """The block where it is kept; where it finds no run, others make way, which nobody gets. The lock is held."""
        if self._arena is None or self._arena.has_lent(block.data):
            return block
        data, insisted = self._arena.take(block.num_bytes), 0
        while data is None and insisted < _INSIST * block.num_bytes and (victim := self._index.evict()) is not None:
            insisted += self._blocks.pop(victim).num_bytes
            data = self._arena.take(block.num_bytes)
        return None if data is None else block.copied_to(data)

    def delete_owner(self, owner: str) -> int:
        return self.forget([owner])

    def forget(self, owners: Collection[str] | None) -> int:
        """Removes every block of some owners, or of everybody; returns how many."""
        with self._lock:
            owned = self._index.owned_by(owners)
            for key in owned:
                self._drop(key)
            return len(owned)

    def _drop(self, key: ContentKey) -> None:
        self._index.remove(key)
        del self._blocks[key]

    def stats(self) -> Sequence[TierStats]:
        with self._lock:
            index = self._index
            return (TierStats("host", len(index), index.used, index.budget, index.evictions, self._dropped),)

    def close(self) -> None:
        pass

    def check(self) -> None:
        """Asserts that index and blocks agree."""
        with self._lock:
            self._index.check()
            assert set(self._index) == set(self._blocks)
            assert all(block.num_bytes == self._index[key].num_bytes for key, block in self._blocks.items())
            assert all(self._arena is None or self._arena.has_lent(block.data) for block in self._blocks.values())
