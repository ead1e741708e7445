"""The pool: published KV blocks on the device, within a byte budget, over one store that may hold more.

Knows nothing of prompts or models. Invariant: a published block never changes, and one that a `Held` has handed out
stays until that `Held` is released. Safe to use from several threads.

    publish → pool —evicted→ store —asked for again→ pool
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rcllm.core.ranking import ContentKey, Source
from rcllm.store.contract import Store, StoredBlock, StoreStats
from rcllm.store.index import Entry, Index
from rcllm.store.null import NullStore


@dataclass(frozen=True, slots=True)
class PoolStats:
    num_blocks: int
    num_bytes: int
    budget_bytes: int
    hits: int
    misses: int
    evictions: int
    store_errors: int  # each was treated as a miss
    store: StoreStats


class Pool:
    """KV blocks in `dtype` on `device`, at most `budget` bytes."""

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device, store: Store | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.store: Store = store if store is not None else NullStore()
        self._index = Index(budget)
        self._blocks: dict[ContentKey, StoredBlock] = {}
        self._lock = threading.RLock()
        self._hits = self._misses = self._store_errors = 0

    @property
    def budget(self) -> int:
        return self._index.budget

    @property
    def free_bytes(self) -> int:
        return self._index.budget - self._index.used

    def contains(self, key: ContentKey) -> bool:
        """Whether the pool or its store has the block; a hint, which another thread's eviction may outdate."""
        with self._lock:
            if key in self._index:
                return True
        try:
            return self.store.contains_many([key])[0]
        except Exception:
            self._count_store_error()
            return False

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """A scope in which the blocks that it fetches and publishes stay in place."""
        held = Held(self)
        try:
            yield held
        finally:
            held.release()

    def delete_owner(self, owner: str) -> int:
        """Removes every block of an item or user from the pool and the store; returns how many.

        A running request that holds one finishes with it; nobody else can get it any more. A store that fails here
        raises: erasing is not best-effort.
        """
        with self._lock:
            owned = self._index.owned_by(owner)
            for key in owned:
                self._index.remove(key)
                del self._blocks[key]
            return len(owned) + self.store.delete_owner(owner)

    def clear(self) -> None:
        """Drops every block from the pool (not from the store). A running request that holds one finishes with it."""
        with self._lock:
            for key in list(self._index):
                self._index.remove(key)
            self._blocks.clear()

    def stats(self) -> PoolStats:
        try:
            below = self.store.stats()
        except Exception:
            self._count_store_error()
            below = StoreStats(0, 0, 0)
        with self._lock:
            counts = (self._hits, self._misses, self._index.evictions, self._store_errors)
            return PoolStats(len(self._blocks), self._index.used, self.budget, *counts, below)

    def check(self) -> None:
        """Asserts that index and blocks agree."""
        with self._lock:
            self._index.check()
            assert set(self._index) == set(self._blocks)
            for key, block in self._blocks.items():
                assert block.num_bytes == self._index[key].num_bytes

    # ---- for Held ----

    def _acquire(self, keys: Iterable[ContentKey]) -> dict[ContentKey, tuple[torch.Tensor, Source]]:
        with self._lock:
            wanted = list(keys)
            found: dict[ContentKey, tuple[torch.Tensor, Source]] = {}
            for key in wanted:
                if key in self._index:
                    self._index.touch(key)
                    self._index.pin(key)
                    found[key] = (self._blocks[key].kv, "device")
            try:
                for key, block in self._from_store([key for key in wanted if key not in found]).items():
                    found[key] = (self._insert(key, block), "host")
            except BaseException:
                self._release(found)
                raise
            self._hits += len(found)
            self._misses += len(wanted) - len(found)
            return found

    def _insert(self, key: ContentKey, block: StoredBlock) -> torch.Tensor:
        """Copies a block in, evicting others to the store, and pins it."""
        with self._lock:
            if key not in self._index:
                num_bytes = block.kv.numel() * self.dtype.itemsize
                evicted = {victim: self._blocks.pop(victim) for victim in self._index.make_room(num_bytes)}
                self._to_store(evicted)
                kv = torch.empty(block.kv.shape, dtype=self.dtype, device=self.device)
                kv.copy_(block.kv)
                self._blocks[key] = StoredBlock(kv, block.cost, block.owner)
                self._index.add(key, Entry(num_bytes, block.cost, block.owner))
            self._index.pin(key)
            return self._blocks[key].kv

    def _release(self, keys: Iterable[ContentKey]) -> None:
        with self._lock:
            for key in keys:
                self._index.unpin(key)

    def _from_store(self, keys: list[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        try:
            return self.store.get_many(keys) if keys else {}
        except Exception:
            self._count_store_error()
            return {}

    def _to_store(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        try:
            if blocks:
                self.store.put_many(blocks)
        except Exception:
            self._count_store_error()

    def _count_store_error(self) -> None:
        with self._lock:
            self._store_errors += 1


class Held:
    """The blocks that one batch works with, pinned. Get one from `Pool.hold`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.blocks: dict[ContentKey, torch.Tensor] = {}
        self.sources: dict[ContentKey, Source] = {}
        self._lent: set[ContentKey] = set()

    def fetch(self, keys: Iterable[ContentKey]) -> list[ContentKey]:
        """Pins those of `keys` that exist, and returns those that do not."""
        new = [key for key in dict.fromkeys(keys) if key not in self.blocks]
        for key, (kv, source) in self._pool._acquire(new).items():
            self.blocks[key], self.sources[key] = kv, source
        return [key for key in new if key not in self.blocks]

    def publish(self, key: ContentKey, kv: torch.Tensor, cost: float, owner: str | None) -> None:
        """Copies `kv` into the pool in its dtype, pinned. Raises CapacityError when pinned blocks leave no room."""
        if key not in self.blocks:
            self.blocks[key] = self._pool._insert(key, StoredBlock(kv, cost, owner))
            self.sources[key] = "computed"

    def lend(self, key: ContentKey, kv: torch.Tensor, source: Source) -> None:
        """Adds a block for this batch alone, in place: the pool never has it, and it ends with the release."""
        assert key not in self.blocks or key in self._lent, "a lent block never stands in for a published one"
        self.blocks[key], self.sources[key] = kv, source
        self._lent.add(key)

    def release(self) -> None:
        self._pool._release(key for key in self.blocks if key not in self._lent)
        self.blocks, self.sources, self._lent = {}, {}, set()
