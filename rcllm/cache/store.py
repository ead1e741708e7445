"""The contract of the tiers below the pool, and its two simplest keepers: nothing, and host memory.

A store may lose what it was given; it may never return something else. Whoever calls it treats an exception as a miss.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rcllm.cache.index import Entry, Index
from rcllm.core import ContentKey


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A published KV block with what its keeper must know. The tensor is immutable from here on."""

    kv: torch.Tensor  # [layers, 2, kv_heads, len, head_dim], in the KV dtype
    cost: float  # of computing it again, in FLOPs
    owner: str | None

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


@dataclass(frozen=True, slots=True)
class StoreStats:
    num_blocks: int
    num_bytes: int
    budget_bytes: int


class Store(Protocol):
    """Keeps KV blocks by content key. Safe to call from several threads; every method may raise."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        """Those of `keys` that it has."""

    def put_many(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        """Takes what it can; may drop other blocks, or these."""

    def contains_many(self, keys: Sequence[ContentKey]) -> Sequence[bool]: ...

    def delete_owner(self, owner: str) -> int:
        """Removes every block of an item or user; returns how many. After it returns, none can be read."""

    def stats(self) -> StoreStats: ...


class NullStore:
    """Keeps nothing."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        return {}

    def put_many(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        pass

    def contains_many(self, keys: Sequence[ContentKey]) -> Sequence[bool]:
        return [False] * len(keys)

    def delete_owner(self, owner: str) -> int:
        return 0

    def stats(self) -> StoreStats:
        return StoreStats(0, 0, 0)


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
