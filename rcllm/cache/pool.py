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
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from rcllm.cache.below import Below, Block
from rcllm.cache.heap import hand_back
from rcllm.cache.held import Acquired, Held
from rcllm.cache.lanes import Copy, Lanes, lanes_of
from rcllm.cache.leaving import Leaving
from rcllm.cache.lookup import Located, Lookup
from rcllm.cache.rates import Rates
from rcllm.cache.room import Loose, Paged, Room
from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.metrics import Clock
from rcllm.model.arrivals import Arriving, Part
from rcllm.model.kv_int8 import empty_for, fill, kept
from rcllm.store.codec import encode
from rcllm.store.contract import Store, Stored, TierStats
from rcllm.store.disk.store import Erased
from rcllm.store.erasures import Erasures
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
        lanes: Lanes | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`space`: names what the blocks are made by, so that a store can tell which ones nobody reads any more.

        `page_bytes`: of the pages of one tensor, of the budget's size, in which all blocks lie, as a GPU wants it; 0:
        each has memory of its own. `lanes`: that blocks are copied on; None for what the device has.
        """
        self.dtype, self.device = dtype, device
        self.rates = Rates(on_gpu=device.type == "cuda")
        self._below = Below(store if store is not None else NullStore(), space, self.rates, clock)
        self._index = Index(budget)
        self._room: Room = Paged(budget, dtype, device, page_bytes) if page_bytes else Loose(dtype, device)
        self.lanes = lanes or lanes_of(device, self.rates.up)
        self._leaving = Leaving(self._below, self.lanes.down)
        self._blocks: dict[ContentKey, Block] = {}
        self._unlisted: list[tuple[ContentKey, Block]] = []  # erased, and still held by somebody
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
            erasures = self._erasures.since
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
        other._below, other.rates, other._leaving = self._below, self.rates, self._leaving
        return other

    @contextmanager
    def hold(self, since: int | None = None) -> Iterator[Held]:
        """A scope in which the blocks that it fetches and publishes stay in place.

        `since`: the `erasures` of the oldest look-up that it works for. Of owners who were erased later, the pool keeps
        nothing that it publishes.
        """
        held = Held(self, since)
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
        with self._erasing([name]) as num_owned:
            return max(num_owned, self.store.delete_owner(name))  # what was published is below as well

    def heed(self, erased: Erased) -> None:
        """Lets go of what other processes have erased from a store that they share with this one."""
        names = (alias(each) for each in erased.owners)
        owners = {name for name in names if name is not None} if erased.complete else None
        with self._erasing(owners):
            self._below.forget(owners)

    @contextmanager
    def _erasing(self, owners: Collection[str] | None) -> Iterator[int]:
        """A scope in which blocks of owners, or of everybody, go from below; from here they went, and none comes in.

        Gives how many went from here.
        """
        with self._lock:
            begun = self._erasures.begin(owners)
            owned = self._index.owned_by(owners)
            for key in owned:
                self._unlist(key)
            self._leaving.forget(owners)
        try:
            yield len(owned)
        finally:
            with self._lock:
                self._erasures.end(begun)

    def owners(self) -> set[str]:
        """By their one name, those of whom a block is here."""
        with self._lock:
            return {owner for key in self._index if (owner := self._index[key].owner) is not None}

    def sealed(self, keys: Iterable[ContentKey]) -> dict[ContentKey, Stored]:
        """What there is of `keys`, here or below, as a store keeps it: for whoever has no part in this memory."""
        with self.hold() as held:
            held.fetch(keys)
            blocks = dict(held.in_place)
            with self._lock:
                listed = {key: self._blocks[key] for key in held.blocks if key in self._blocks}
            blocks |= {key: replace(block, kv=held.blocks[key]) for key, block in listed.items()}
            return {key: self._below.sealed(encode(block.kv), block) for key, block in blocks.items()}

    def clear(self) -> None:
        """Drops every block from the pool (not from the store). A running request that holds one finishes with it."""
        with self._lock:
            for key in list(self._index):
                self._unlist(key)

    def write_through(self) -> None:
        """Hands down what was published, once it is copied; takes back what was erased meanwhile.

        Called between passes, so that no request waits for a store. It waits for no copy either: those that it begins,
        a later call hands down, or `settle`.
        """
        self._leaving.begin()
        self._leaving.land()

    def settle(self) -> None:
        """Hands down all that was published; waits for its copies."""
        self._leaving.settle()

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
            self._room.check(block.kv for block in (*self._blocks.values(), *(each for _, each in self._unlisted)))

    # ---- for Held ----

    def acquire(self, keys: Iterable[ContentKey], dear: Container[ContentKey]) -> Acquired:
        """Pins what there is of `keys`; what only the store has is read, but for what is `dear`.

        It is copied in where there is room. Where there is none, it is read where it lies: the system keeps what is
        read often in memory, and nothing has to make way.
        """
        wanted = list(keys)
        with self._lock:
            got = Acquired(self._erasures.since)
            for key in self._index.take(wanted):
                got.pinned[key] = (self._found(key), "device")
        try:
            below = [key for key in wanted if key not in got.pinned and key not in dear]
            self._bring_up(self._below.read_many(below), got)
        except BaseException:
            self.release(got.pinned)
            raise
        with self._lock:
            self._hits.update(source for _, source in (*got.pinned.values(), *got.in_place.values()))
            self._misses += len(wanted) - len(got.pinned) - len(got.in_place)
        return got

    def _found(self, key: ContentKey) -> Block:
        """A listed block, which has arrived where that is known. The lock is held."""
        block = self._blocks[key]
        if block.arriving is not None and block.arriving.is_over:
            block = self._blocks[key] = replace(block, arriving=None)
        return block

    def _bring_up(self, read: Mapping[ContentKey, tuple[Block, Source]], got: Acquired) -> None:
        """Begins to copy in what was read, and pins it, or leaves it in place. Raises CapacityError."""
        sources = self._sources(read)
        with self._lock:
            new = dict[ContentKey, Copy]()
            try:
                for key, source in sources.items():
                    block, tier = read[key]
                    if self._erasures.hit(block.owner, got.erasures):
                        continue
                    if self._readable_in_place(block):
                        got.in_place[key] = (block, tier)
                        continue
                    if key not in self._index:
                        new[key] = Copy(self._listed(key, block).kv, source)
                    self._index.pin(key)
                    got.pinned[key] = (self._found(key), tier)
            finally:
                self._send(new, got)

    def _sources(self, read: Mapping[ContentKey, tuple[Block, Source]]) -> dict[ContentKey, torch.Tensor]:
        """KV as it is copied in; without those that there is no memory for, which are misses that are counted."""
        sources = {}
        for key, (block, _) in read.items():
            kv = block.kv if block.kv.dtype == self.dtype else kept(block.kv, self.dtype, block.kv.device)
            try:
                sources[key] = self.lanes.up.ready(kv)
            except RuntimeError:
                self._below.count_errors()
        return sources

    def _readable_in_place(self, block: Block) -> bool:
        fits = block.num_bytes <= self.free_bytes
        return not fits and self.device.type == "cpu" and block.kv.dtype == self.dtype

    def _send(self, new: Mapping[ContentKey, Copy], got: Acquired) -> None:
        """Begins to copy blocks that were listed; where that fails, they are misses, counted. The lock is held."""
        if not new:
            return
        try:
            arriving = self._arriving(list(new.values()))
        except RuntimeError:
            self._below.count_errors(len(new))
            for key in new:
                self._index.unpin(key)
                self._unlist(key)
                got.pinned.pop(key, None)
            return
        for key in new:
            self._blocks[key] = replace(self._blocks[key], arriving=arriving)
            got.pinned[key] = (self._blocks[key], got.pinned[key][1])

    def _arriving(self, copies: Sequence[Copy]) -> Arriving | None:
        """Begins copies, some layers of all blocks before the next ones; None: they have ended. Raises RuntimeError."""
        lane, num_layers = self.lanes.up, len(copies[0].to)
        firsts = sorted({num_layers * number // lane.num_parts for number in range(lane.num_parts)})
        parts = [
            [Copy(copy.to[first:end], copy.source[first:end]) for copy in copies]
            for first, end in pairwise([*firsts, num_layers])
        ]
        if not (marks := lane.send(parts)):
            return None
        return Arriving(tuple(map(Part, firsts, marks)))

    def insert(self, key: ContentKey, block: Block, since: int | None = None, *, written: bool = True) -> Block | None:
        """Copies a block in, evicting others, and pins it; None: its owner was erased after `since`."""
        with self._lock:
            if since is not None and self._erasures.hit(block.owner, since):
                return None
            if key not in self._index:
                fill(self._listed(key, block).kv, block.kv)
                if not written and not self._below.keeps_nothing:
                    self._leaving.note(key, self._blocks[key])
            self._index.pin(key)
            return self._found(key)

    def _listed(self, key: ContentKey, block: Block) -> Block:
        """The same block with memory of the pool, which is to be filled. Raises CapacityError. The lock is held."""
        num_bytes = self._room.num_bytes(block.kv)
        for victim in self._index.make_room(num_bytes):
            self._free(victim, self._blocks.pop(victim))
        listed = self._blocks[key] = replace(block, kv=self._memory_for(block.kv))
        self._index.add(key, Entry(num_bytes, block.cost, block.owner))
        return listed

    def _memory_for(self, kv: torch.Tensor) -> torch.Tensor:
        """Of the pool, where there is room by now; beside it, where held blocks lie in the way. The lock is held."""
        if (memory := self._room.take(kv)) is None:
            self._compact()
            memory = self._room.take(kv)
        return memory if memory is not None else empty_for(kv, self.dtype, self.device)

    def _compact(self) -> None:
        """Moves together what nobody holds, after all copies from or to it. The lock is held."""
        movable = {key: block for key, block in self._blocks.items() if not self._index.is_pinned(key)}
        self._leaving.wait()
        for arriving in {block.arriving for block in movable.values() if block.arriving is not None}:
            arriving.wait()
        for key, moved in self._room.compacted({key: block.kv for key, block in movable.items()}).items():
            self._blocks[key] = replace(self._blocks[key], kv=moved, arriving=None)
            self._leaving.moved(key, moved)

    def _unlist(self, key: ContentKey) -> None:
        """Takes a block out; its memory stays until those who hold it release it. The lock is held."""
        self._index.remove(key)
        block = self._blocks.pop(key)
        if self._index.is_pinned(key):
            self._unlisted.append((key, block))
        else:
            self._free(key, block)

    def _free(self, key: ContentKey, block: Block) -> None:
        """Gives back the memory of a block that nobody holds: it may be used anew after all copies from or to it."""
        if self._room.reuses:
            self._leaving.gone(key)
        if block.arriving is not None:
            block.arriving.wait()
        self._room.free(block.kv)

    def pin_again(self, keys: Iterable[ContentKey]) -> list[ContentKey]:
        """Pins those of `keys`, all of them pinned, that are still listed: what was erased is nobody's to keep."""
        with self._lock:
            listed = [key for key in keys if key in self._index]
            for key in listed:
                self._index.pin(key)
            return listed

    def release(self, keys: Iterable[ContentKey]) -> None:
        """Unpins."""
        with self._lock:
            for key in keys:
                self._index.unpin(key)
            unlisted, self._unlisted = self._unlisted, []
            for key, block in unlisted:
                if self._index.is_pinned(key):
                    self._unlisted.append((key, block))
                else:
                    self._free(key, block)


@lru_cache(maxsize=1024)  # blocks have few sizes
def _near(num_bytes: int) -> Located:
    return Located("device", num_bytes, 0.0)
