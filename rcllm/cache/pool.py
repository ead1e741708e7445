"""The pool: published KV blocks on the device, within a byte budget, over one store that may hold more.

Knows nothing of prompts or models. Invariants: a published block never changes, and one that a `Held` has handed out
stays until that `Held` is released; the store is never called under the pool's lock, and yet nothing of an owner comes
back after `delete_owner`. Safe to use from several threads.

    publish → pool —evicted→ store —asked for again→ pool
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from rcllm.cache.lookup import Lookup
from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.model.kv_int8 import kept, kept_bytes
from rcllm.store.codec import CorruptBlockError, decode, encode
from rcllm.store.contract import Found, Store, Stored, StoreStats
from rcllm.store.index import Entry, Index
from rcllm.store.null import NullStore

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class Block:
    """A published KV block. The tensor is immutable from here on."""

    kv: torch.Tensor  # [layers, 2, kv_heads, len, columns], in the pool's dtype
    cost: float  # of computing it again, in FLOPs
    owner: str | None

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class Pool:
    """KV blocks in `dtype` on `device`, at most `budget` bytes."""

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device, store: Store | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.store: Store = store if store is not None else NullStore()
        self._index = Index(budget)
        self._blocks: dict[ContentKey, Block] = {}
        self._lock = threading.Lock()
        self._erasures = Erasures()
        self._hits = self._misses = self._store_errors = 0

    @property
    def budget(self) -> int:
        return self._index.budget

    @property
    def free_bytes(self) -> int:
        return self._index.budget - self._index.used

    def lookup_many(self, keys: Iterable[ContentKey]) -> Lookup:
        """Where each of `keys` is, the nearest tier first; a hint, which another thread's eviction may outdate."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            erasures = self._erasures.now
        found = self._on_device(wanted)
        if rest := [key for key in wanted if key not in found]:
            found |= self._asking(lambda: self.store.lookup_many(rest)) or {}
        return Lookup(found, erasures)

    def refreshed(self, lookup: Lookup, keys: Iterable[ContentKey]) -> Lookup:
        """`lookup` with what the device has by now; asks no store, so it may be called where a pass waits."""
        stored = {key: found for key, found in lookup.found.items() if found.tier != "device"}
        return Lookup(stored | self._on_device(keys), lookup.erasures)

    def was_erased(self, owner: str, since: int) -> bool:
        """Whether an owner was erased after a look-up, whose `erasures` is `since`."""
        with self._lock:
            return self._erasures.hit(owner, since)

    def _on_device(self, keys: Iterable[ContentKey]) -> dict[ContentKey, Found]:
        with self._lock:
            return {key: Found("device", self._index[key].num_bytes, 0.0) for key in keys if key in self._index}

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
            self._erasures.add(owner)
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
        below = self._asking(self.store.stats) or StoreStats(0, 0, 0)
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
        """Pins what there is of `keys`; what only the store has is read and copied in."""
        wanted = list(keys)
        found: dict[ContentKey, tuple[torch.Tensor, Source]] = {}
        with self._lock:
            since = self._erasures.now
            for key in wanted:
                if key in self._index:
                    self._index.touch(key)
                    self._index.pin(key)
                    found[key] = (self._blocks[key].kv, "device")
        try:
            for key, block in self._from_store([key for key in wanted if key not in found]).items():
                if (kv := self._insert(key, block, since)) is not None:
                    found[key] = (kv, "host")
        except BaseException:
            self._release(found)
            raise
        with self._lock:
            self._hits += len(found)
            self._misses += len(wanted) - len(found)
        return found

    def _insert(self, key: ContentKey, block: Block, since: int | None = None) -> torch.Tensor | None:
        """Copies a block in, evicting others to the store, and pins it; None: its owner was erased after `since`."""
        with self._lock:
            if since is not None and self._erasures.hit(block.owner, since):
                return None
            evicted: dict[ContentKey, Block] = {}
            if key not in self._index:
                num_bytes = kept_bytes(block.kv, self.dtype)
                evicted = {victim: self._blocks.pop(victim) for victim in self._index.make_room(num_bytes)}
                kv = kept(block.kv, self.dtype, self.device)
                self._blocks[key] = Block(kv, block.cost, block.owner)
                self._index.add(key, Entry(num_bytes, block.cost, block.owner))
            self._index.pin(key)
            kv, now = self._blocks[key].kv, self._erasures.now
        self._to_store(evicted, now)
        return kv

    def _pin_again(self, keys: Iterable[ContentKey]) -> list[ContentKey]:
        """Pins those of `keys`, all of them pinned, that are still listed: what was erased is nobody's to keep."""
        with self._lock:
            listed = [key for key in keys if key in self._index]
            for key in listed:
                self._index.pin(key)
            return listed

    def _release(self, keys: Iterable[ContentKey]) -> None:
        with self._lock:
            for key in keys:
                self._index.unpin(key)

    def _from_store(self, keys: list[ContentKey]) -> Mapping[ContentKey, Block]:
        if not keys:
            return {}
        stored = self._asking(lambda: self.store.get_many(keys)) or {}
        blocks = {}
        for key, block in stored.items():
            try:
                blocks[key] = Block(decode(block.data), block.cost, block.owner)
            except CorruptBlockError:
                self._count_store_error()
        return blocks

    def _to_store(self, blocks: Mapping[ContentKey, Block], since: int) -> None:
        """Hands blocks down that were evicted at `since`; takes back those whose owner was erased meanwhile."""
        if not blocks or isinstance(self.store, NullStore):
            return
        self._asking(
            lambda: self.store.put_many(
                {key: Stored(encode(block.kv), block.cost, block.owner) for key, block in blocks.items()}
            )
        )
        with self._lock:
            erased = {block.owner for block in blocks.values() if self._erasures.hit(block.owner, since)}
        for owner in erased:
            assert owner is not None
            self.store.delete_owner(owner)

    def _asking(self, ask: Callable[[], T]) -> T | None:
        """What the store answers; None, counted, where it fails: the cache may fail, the request may not."""
        try:
            return ask()
        except Exception:
            self._count_store_error()
            return None

    def _count_store_error(self) -> None:
        with self._lock:
            self._store_errors += 1


class Erasures:
    """When each owner was last erased, so that whatever was under way meanwhile is not kept. The pool locks."""

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[str, int] = {}

    def add(self, owner: str) -> None:
        self.now += 1
        self._last[owner] = self.now

    def hit(self, owner: str | None, since: int) -> bool:
        """Whether the owner was erased after `since`, a former `now`."""
        return owner is not None and self._last.get(owner, 0) > since


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
            kv_kept = self._pool._insert(key, Block(kv, cost, owner))
            assert kv_kept is not None
            self.blocks[key] = kv_kept
            self.sources[key] = "computed"

    def lend(self, key: ContentKey, kv: torch.Tensor, source: Source) -> None:
        """Adds a block for this batch alone, in place: the pool never has it, and it ends with the release."""
        assert key not in self.blocks or key in self._lent, "a lent block never stands in for a published one"
        self.blocks[key], self.sources[key] = kv, source
        self._lent.add(key)

    def also(self, keys: Iterable[ContentKey]) -> Held:
        """Another holder of some of the same blocks, which may outlive this one. Blocks that were lent are not kept."""
        other = Held(self._pool)
        for key in self._pool._pin_again(key for key in dict.fromkeys(keys) if key not in self._lent):
            other.blocks[key], other.sources[key] = self.blocks[key], self.sources[key]
        return other

    def release(self) -> None:
        self._pool._release(key for key in self.blocks if key not in self._lent)
        self.blocks, self.sources, self._lent = {}, {}, set()
