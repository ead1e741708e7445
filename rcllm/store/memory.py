"""Host memory as a tier, within a byte budget.

Knows nothing of tensors. Invariant: index and blocks name the same keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.index import Entry, Index


class MemoryStore:
    """At most `budget` bytes of blocks; those that cost least per byte to compute again go first."""

    def __init__(self, budget: int) -> None:
        self._index = Index(budget)
        self._blocks: dict[ContentKey, Stored] = {}
        self._dropped = 0
        self._lock = threading.Lock()

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

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        self.put_evicting(blocks)

    def put_evicting(self, blocks: Mapping[ContentKey, Stored]) -> Mapping[ContentKey, Stored]:
        """The same; returns the blocks that had to make way, which a farther tier may want."""
        copies = {key: block.owned() for key, block in blocks.items()}
        evicted: dict[ContentKey, Stored] = {}
        with self._lock:
            for key in copies.keys() & self._blocks.keys():
                self._drop(key)
            for key, block in copies.items():
                if block.num_bytes > self._index.budget:
                    self._dropped += 1
                    continue
                evicted |= {victim: self._blocks.pop(victim) for victim in self._index.make_room(block.num_bytes)}
                self._index.add(key, Entry(block.num_bytes, block.cost, block.owner))
                self._blocks[key] = block
        return evicted

    def delete_owner(self, owner: str) -> int:
        with self._lock:
            owned = self._index.owned_by(owner)
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
