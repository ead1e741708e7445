"""Host memory as a tier, within a byte budget. Invariant: index and blocks name the same keys."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import StoredBlock, StoreStats
from rcllm.store.index import Entry, Index


class MemoryStore:
    """Host memory, within a byte budget."""

    def __init__(self, budget: int) -> None:
        self._index = Index(budget)
        self._blocks: dict[ContentKey, StoredBlock] = {}
        self._lock = threading.Lock()

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        with self._lock:
            found = {key: self._blocks[key] for key in keys if key in self._blocks}
            for key in found:
                self._index.touch(key)
            return found

    def put_many(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        with self._lock:
            for key, block in blocks.items():
                if key in self._blocks or block.num_bytes > self._index.budget:
                    continue
                for victim in self._index.make_room(block.num_bytes):
                    del self._blocks[victim]
                self._index.add(key, Entry(block.num_bytes, block.cost, block.owner))
                self._blocks[key] = StoredBlock(block.kv.to("cpu"), block.cost, block.owner)

    def contains_many(self, keys: Sequence[ContentKey]) -> Sequence[bool]:
        with self._lock:
            return [key in self._blocks for key in keys]

    def delete_owner(self, owner: str) -> int:
        with self._lock:
            owned = self._index.owned_by(owner)
            for key in owned:
                self._index.remove(key)
                del self._blocks[key]
            return len(owned)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(len(self._blocks), self._index.used, self._index.budget)

    def check(self) -> None:
        """Asserts that index and blocks agree."""
        with self._lock:
            self._index.check()
            assert set(self._index) == set(self._blocks)
