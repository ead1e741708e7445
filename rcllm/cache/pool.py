"""The pool: published KV blocks on the device, within a byte budget, over one store that may hold more.

Knows nothing of prompts or models. Invariants: a published block never changes, and one that a `Held` has handed out
stays until that `Held` is released; the store is never called under the pool's lock, and yet nothing of an owner comes
back after `delete_owner`. Safe to use from several threads.

    publish → pool, and between passes → store —asked for when the pool has it no more→ pool, or read in place
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from rcllm.cache.below import Below, Block
from rcllm.cache.heap import hand_back
from rcllm.cache.lookup import Located, Lookup
from rcllm.cache.rates import Rates
from rcllm.cache.room import Loose, Paged, Room
from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.metrics import Clock
from rcllm.model.kv_int8 import kept
from rcllm.store.codec import encode
from rcllm.store.contract import Store, Stored, TierStats
from rcllm.store.disk.store import Erased
from rcllm.store.index import Entry, Index
from rcllm.store.null import NullStore
from rcllm.store.owners import alias, one_name

_TIDY_SHARE = 0.25  # of the pool's budget: how much leaves it before the heap is tidied again


@dataclass(frozen=True, slots=True)
class PoolStats:
    num_blocks: int
    num_bytes: int
    budget_bytes: int
    hits: Mapping[Source, int]  # blocks that were asked for, by the tier that had them
    misses: int
    evictions: int
    store_errors: int  # each was treated as a miss
    tiers: tuple[TierStats, ...]  # below the pool, the nearest first


class Pool:
    """KV blocks in `dtype` on `device`, at most `budget` bytes."""

    def __init__(
        self,
        budget: int,
        dtype: torch.dtype,
        device: torch.device,
        store: Store | None = None,
        *,
        space: str = "",
        page_bytes: int = 0,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`space`: names what the blocks are made by, so that a store can tell which ones nobody reads any more.

        `page_bytes`: of the pages of one tensor, of the budget's size, in which all blocks lie, as a GPU wants it; 0:
        each has memory of its own.
        """
        self.dtype, self.device = dtype, device
        self.rates = Rates()
        self._below = Below(store if store is not None else NullStore(), space, self.rates, clock)
        self._index = Index(budget)
        self._room: Room = Paged(budget, dtype, device, page_bytes) if page_bytes else Loose(dtype, device)
        self._blocks: dict[ContentKey, Block] = {}
        self._unlisted: list[tuple[ContentKey, torch.Tensor]] = []  # erased, and still held by somebody
        self._unwritten: dict[ContentKey, Block] = {}  # published, and not handed down yet
        self._lock = threading.Lock()
        self._erasures = Erasures()
        self._hits: Counter[Source] = Counter()
        self._misses = 0
        self._freed_tidied = 0  # of the index's `freed`, when the heap was last tidied

    @property
    def store(self) -> Store:
        return self._below.store

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
        return Lookup(found | self._below.lookup_many([key for key in wanted if key not in found]), erasures)

    def refreshed(self, lookup: Lookup, keys: Iterable[ContentKey]) -> Lookup:
        """`lookup` with what the device has by now; asks no store, so it may be called where a pass waits."""
        stored = {key: found for key, found in lookup.found.items() if found.tier != "device"}
        now = self._on_device(keys)
        return Lookup(stored | now, lookup.erasures, lookup.dear - now.keys())

    def was_erased(self, owner: str | None, since: int) -> bool:
        """Whether an owner was erased after a look-up, whose `erasures` is `since`."""
        with self._lock:
            return self._erasures.now > since and self._erasures.hit(one_name(owner), since)

    def _on_device(self, keys: Iterable[ContentKey]) -> dict[ContentKey, Located]:
        with self._lock:
            return {key: _near(self._index[key].num_bytes) for key in keys if key in self._index}

    def beside(self, num_bytes: int) -> Pool:
        """An empty pool of this size over the same store: for blocks that are computed for the store alone."""
        other = Pool(num_bytes, self.dtype, self.device)
        other._below, other.rates = self._below, self.rates
        return other

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
        name = one_name(owner)
        assert name is not None
        with self._lock:
            owned = self._forget(name)
        return max(len(owned), self.store.delete_owner(name))  # what was published is below as well

    def _forget(self, owner: str) -> list[ContentKey]:
        """Lets an owner's blocks go from the pool, and none that is under way come in. The lock is held."""
        self._erasures.add(owner)
        owned = self._index.owned_by(owner)
        for key in owned:
            self._unlist(key)
        self._unwritten = {key: block for key, block in self._unwritten.items() if block.owner != owner}
        return owned

    def heed(self, erased: Erased) -> None:
        """Lets go of what other processes have erased from a store that they share with this one."""
        with self._lock:
            held = {owner for key in self._index if (owner := self._index[key].owner) is not None}
            named = {alias(each) for each in erased.owners}
            for owner in held if not erased.complete else held & named:
                self._forget(owner)

    def owners(self) -> set[str]:
        """By their one name, those of whom a block is here."""
        with self._lock:
            return {owner for key in self._index if (owner := self._index[key].owner) is not None}

    def sealed(self, keys: Iterable[ContentKey]) -> dict[ContentKey, Stored]:
        """What there is of `keys`, here or below, as a store keeps it: for whoever has no part in this memory."""
        with self.hold() as held:
            held.fetch(keys)
            blocks = {key: block for key, (block, _) in held._in_place.items()}
            with self._lock:
                blocks |= {key: self._blocks[key] for key in held.blocks if key in self._blocks}
            return {
                key: Stored(encode(block.kv), block.cost, block.owner, self._below.space)
                for key, block in blocks.items()
            }

    def clear(self) -> None:
        """Drops every block from the pool (not from the store). A running request that holds one finishes with it."""
        with self._lock:
            for key in list(self._index):
                self._unlist(key)

    def write_through(self) -> None:
        """Hands down what was published since the last time; takes back what was erased meanwhile.

        Called between passes, so that no request waits for a store.
        """
        with self._lock:
            blocks, self._unwritten, now = self._unwritten, {}, self._erasures.now
            listed = [key for key in blocks if key in self._index and self._room.reuses]
            for key in listed:  # its memory must stay while it is written
                self._index.pin(key)
        try:
            if not blocks:
                return
            self._below.write_many(blocks)
        finally:
            self._release(listed)
        with self._lock:
            erased = {block.owner for block in blocks.values() if self._erasures.hit(block.owner, now)}
        for owner in erased:
            assert owner is not None
            self.store.delete_owner(owner)

    def tidy(self) -> None:
        """Lets the system have what evicted blocks left between others, now and then. Called between passes."""
        if self.device.type == "cpu" and self._index.freed - self._freed_tidied > self.budget * _TIDY_SHARE:
            self._freed_tidied = self._index.freed
            hand_back()

    def passed_over(self, lookup: Lookup) -> None:
        """What a look-up set apart was computed: its tiers may have become faster unseen."""
        self._below.passed_over({lookup.found[key].tier for key in lookup.dear})

    def stats(self) -> PoolStats:
        tiers = self._below.stats()
        with self._lock:
            counts = (dict(self._hits), self._misses, self._index.evictions, self._below.errors)
            return PoolStats(len(self._blocks), self._index.used, self.budget, *counts, tiers)

    def check(self) -> None:
        """Asserts that index and blocks agree."""
        with self._lock:
            self._index.check()
            assert set(self._index) == set(self._blocks)
            for key, block in self._blocks.items():
                assert self._room.num_bytes(block.kv) == self._index[key].num_bytes
            self._room.check([block.kv for block in self._blocks.values()] + [kv for _, kv in self._unlisted])

    # ---- for Held ----

    def _acquire(self, keys: Iterable[ContentKey], dear: Container[ContentKey]) -> Acquired:
        """Pins what there is of `keys`; what only the store has is read, but for what is `dear`.

        It is copied in where there is room. Where there is none, it is read where it lies: the system keeps what is
        read often in memory, and nothing has to make way.
        """
        wanted = list(keys)
        with self._lock:
            since = self._erasures.now
            got = Acquired(since)
            for key in self._index.take(wanted):
                got.pinned[key] = (self._blocks[key].kv, "device")
        try:
            below = [key for key in wanted if key not in got.pinned and key not in dear]
            for key, (block, tier) in self._below.read_many(below).items():
                if self._readable_in_place(block):
                    if not self.was_erased(block.owner, since):
                        got.in_place[key] = (block, tier)
                elif (kv := self._insert(key, block, since)) is not None:
                    got.pinned[key] = (kv, tier)
        except BaseException:
            self._release(got.pinned)
            raise
        with self._lock:
            self._hits.update(source for _, source in (*got.pinned.values(), *got.in_place.values()))
            self._misses += len(wanted) - len(got.pinned) - len(got.in_place)
        return got

    def _readable_in_place(self, block: Block) -> bool:
        fits = block.num_bytes <= self.free_bytes
        return not fits and self.device.type == "cpu" and block.kv.dtype == self.dtype

    def _insert(
        self, key: ContentKey, block: Block, since: int | None = None, *, written: bool = True
    ) -> torch.Tensor | None:
        """Copies a block in, evicting others, and pins it; None: its owner was erased after `since`."""
        with self._lock:
            if since is not None and self._erasures.hit(block.owner, since):
                return None
            if key not in self._index:
                num_bytes = self._room.num_bytes(block.kv)
                for victim in self._index.make_room(num_bytes):
                    self._let_go(victim)
                kv = self._placed(block.kv)
                self._blocks[key] = Block(kv, block.cost, block.owner)
                self._index.add(key, Entry(num_bytes, block.cost, block.owner))
                if not written and not self._below.keeps_nothing:
                    self._unwritten[key] = self._blocks[key]
            self._index.pin(key)
            return self._blocks[key].kv

    def _placed(self, kv: torch.Tensor) -> torch.Tensor:
        """A copy in the pool's memory, where there is room by now. The lock is held."""
        placed = self._room.put(kv)
        if placed is None:
            movable = {key: block.kv for key, block in self._blocks.items() if not self._index.is_pinned(key)}
            for key, moved in self._room.compacted(movable).items():
                self._blocks[key] = replace(self._blocks[key], kv=moved)
                if key in self._unwritten:
                    self._unwritten[key] = self._blocks[key]
            placed = self._room.put(kv)
        return placed if placed is not None else kept(kv, self.dtype, self.device)  # held blocks lie in the way

    def _let_go(self, key: ContentKey) -> None:
        """Of a block that nobody holds and that is listed no more. The lock is held."""
        block = self._blocks.pop(key)
        if key in self._unwritten and self._room.reuses:  # still to be handed down
            self._unwritten[key] = replace(block, kv=block.kv.to("cpu", copy=True))
        self._room.free(block.kv)

    def _unlist(self, key: ContentKey) -> None:
        """Takes a block out; its memory stays until those who hold it release it. The lock is held."""
        self._index.remove(key)
        if self._index.is_pinned(key):
            self._unlisted.append((key, self._blocks.pop(key).kv))
        else:
            self._let_go(key)

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
            still = [(key, kv) for key, kv in self._unlisted if self._index.is_pinned(key)]
            for key, kv in self._unlisted:
                if not self._index.is_pinned(key):
                    self._room.free(kv)
            self._unlisted = still


@lru_cache(maxsize=1024)  # blocks have few sizes
def _near(num_bytes: int) -> Located:
    return Located("device", num_bytes, 0.0)


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


@dataclass(frozen=True, slots=True)
class Acquired:
    """What there is of the blocks that were asked for."""

    erasures: int  # how many owners had been erased by then
    pinned: dict[ContentKey, tuple[torch.Tensor, Source]] = field(default_factory=dict)
    in_place: dict[ContentKey, tuple[Block, Source]] = field(default_factory=dict)  # read where a tier keeps them


class Held:
    """The blocks that one batch works with, pinned. Get one from `Pool.hold`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.blocks: dict[ContentKey, torch.Tensor] = {}
        self.sources: dict[ContentKey, Source] = {}
        self._lent: set[ContentKey] = set()
        self._in_place: dict[ContentKey, tuple[Block, int]] = {}  # with the erasures when it was read

    def fetch(self, keys: Iterable[ContentKey], dear: Container[ContentKey] = ()) -> list[ContentKey]:
        """Gets those of `keys` that exist, and returns those that do not; of `dear` ones, the store is not asked."""
        new = [key for key in dict.fromkeys(keys) if key not in self.blocks]
        got = self._pool._acquire(new, dear)
        for key, (kv, source) in got.pinned.items():
            self.blocks[key], self.sources[key] = kv, source
        for key, (block, source) in got.in_place.items():
            self.blocks[key], self.sources[key] = block.kv, source
            self._in_place[key] = (block, got.erasures)
        return [key for key in new if key not in self.blocks]

    def publish(self, key: ContentKey, kv: torch.Tensor, cost: float, owner: str | None) -> None:
        """Copies `kv` into the pool in its dtype, pinned. Raises CapacityError when pinned blocks leave no room."""
        if key not in self.blocks:
            kv_kept = self._pool._insert(key, Block(kv, cost, one_name(owner)), written=False)
            assert kv_kept is not None
            self.blocks[key] = kv_kept
            self.sources[key] = "computed"

    def lend(self, key: ContentKey, kv: torch.Tensor, source: Source) -> None:
        """Adds a block for this batch alone, in place: the pool never has it, and it ends with the release."""
        assert key not in self.blocks or key in self._lent, "a lent block never stands in for a published one"
        self.blocks[key], self.sources[key] = kv, source
        self._lent.add(key)

    def also(self, keys: Iterable[ContentKey]) -> Held:
        """Another holder of some of the same blocks, which may outlive this one. Blocks that were lent are not kept.

        What is read in place is copied in first, for a tier keeps it in place for a short time only. Raises
        CapacityError, with nothing kept, where there is no room for that.
        """
        other = Held(self._pool)
        wanted = [key for key in dict.fromkeys(keys) if key not in self._lent]
        try:
            for key in (key for key in wanted if key in self._in_place):
                if (kv := self._pool._insert(key, *self._in_place[key])) is not None:
                    other.blocks[key], other.sources[key] = kv, self.sources[key]
        except BaseException:
            other.release()
            raise
        for key in self._pool._pin_again(key for key in wanted if key not in self._in_place):
            other.blocks[key], other.sources[key] = self.blocks[key], self.sources[key]
        return other

    def release(self) -> None:
        self._pool._release(key for key in self.blocks if key not in self._lent and key not in self._in_place)
        self.blocks, self.sources, self._lent, self._in_place = {}, {}, set(), {}
