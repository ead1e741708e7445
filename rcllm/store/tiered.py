"""Tiers above each other: host memory, written at once, over tiers that last, written behind by one thread.

Knows nothing of what a tier is made of. Invariants: what was put last under a key is found before what was put
earlier; after `delete_owner` nothing of the owner comes back that was kept, waiting to be written or being copied; a
tier that fails is a tier that has nothing, except for `delete_owner`.

    put ──▶ memory ──evicted──▶ queue ──▶ disk ──▶ shared          the queue drops what it has no room for, and counts
            memory ◀── copied ── what is found farther away ──▶ queue, for those lasting tiers before it

Owners go by one name, the alias that stands in lasting tiers, so that a copy that was read back is erased as well.

Where the queue dropped what was put, a lasting tier may still have what was put under the same key before: equal by its
content key, unless it is corrupt, which whoever opens it finds out.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.errors import ErasureError
from rcllm.metrics import Clock
from rcllm.store.arena import Arena
from rcllm.store.behind import Batch, Waiting, WriteBehind
from rcllm.store.contract import Found, Store, Stored, TierStats
from rcllm.store.erasures import Erasures
from rcllm.store.guarded import GuardedStore
from rcllm.store.memory import MemoryStore
from rcllm.store.owners import one_name
from rcllm.store.sealed import is_whole


@dataclass(eq=False, slots=True)
class _Read:
    """A read of lasting tiers that is under way, and what was replaced meanwhile: none of it may be copied nearer."""

    since: int  # of erasures, when it began
    replaced: set[ContentKey] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A block, and where it was found."""

    place: int  # of the lasting tier, 0 for the nearest
    block: Stored


class Tiered:
    """`memory_bytes` of host memory over `lasting`, the nearest first.

    At most `queue_bytes` wait to be written. Starts a thread with the first block that is to be written. `close`, the
    end of the last reference, or the end of the interpreter writes what waits, and closes the tiers.
    """

    def __init__(
        self,
        lasting: Mapping[Source, Store],
        *,
        memory_bytes: int = 0,
        arena: Arena | None = None,
        queue_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        """arena: host memory that blocks lie in, in place of `memory_bytes`."""
        self._memory = MemoryStore(memory_bytes) if arena is None else MemoryStore.within(arena)
        self._memory_bytes = self._memory.budget
        self._lasting = tuple(GuardedStore(store, tier, clock) for tier, store in lasting.items())
        self._behind = WriteBehind(partial(_write, self._lasting), queue_bytes)
        self._lock = threading.Lock()  # orders what changes memory and queue; no lasting tier is asked under it
        self._reads: list[_Read] = []
        self._erasures = Erasures()
        self._memory_hits = 0
        self._hits: Counter[int] = Counter()  # blocks, by the place of their lasting tier
        self._promoted: Counter[int] = Counter()
        self._end = weakref.finalize(self, _close, self._behind, self._lasting)

    @property
    def lasting(self) -> tuple[Store, ...]:
        """The lasting tiers, the nearest first."""
        return tuple(tier.store for tier in self._lasting)

    @property
    def unfilled_bytes(self) -> int:
        """How much more of this process's memory blocks may take, in memory and in the queue."""
        return self._memory.unfilled_bytes + (self._behind.unfilled_bytes if self._lasting else 0)

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        wanted = list(dict.fromkeys(keys))
        found = dict(self._memory.lookup_many(wanted))
        waiting = self._behind.get_many(key for key in wanted if key not in found)
        found |= {key: Found("host", block.num_bytes) for key, block in waiting.items()}
        for tier in self._lasting:
            found |= tier.lookup_many(key for key in wanted if key not in found)
        return found

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        wanted = list(dict.fromkeys(keys))
        with self._reading() as read:
            with self._lock:
                near = dict(self._memory.get_many(wanted))
                near |= self._behind.get_many(key for key in wanted if key not in near)
            farther = self._from_lasting([key for key in wanted if key not in near])
            with self._lock:
                self._memory_hits += len(near)
                self._hits.update(each.place for each in farther.values())
                kept = {key: each for key, each in farther.items() if not self._was_erased(each.block, read)}
                self._promote({key: each for key, each in kept.items() if key not in read.replaced})
        return near | {key: each.block for key, each in kept.items()}

    def _was_erased(self, block: Stored, read: _Read) -> bool:
        return self._erasures.hit(one_name(block.owner), read.since)

    @contextmanager
    def _reading(self) -> Iterator[_Read]:
        """A scope in which a read is told what happens meanwhile."""
        with self._lock:
            read = _Read(self._erasures.since)
            self._reads.append(read)
        try:
            yield read
        finally:
            with self._lock:
                self._reads.remove(read)

    def _from_lasting(self, keys: Sequence[ContentKey]) -> dict[ContentKey, _Placed]:
        """Those of `keys` that a lasting tier has.

        What nearer tiers will have too gets bytes of its own, and must be whole: where it is not, the next tier is
        asked.
        """
        found: dict[ContentKey, _Placed] = {}
        for place, tier in enumerate(self._lasting):
            for key, block in tier.get_many(key for key in keys if key not in found).items():
                placed = _Placed(place, block)
                if not self._is_copied(placed):
                    found[key] = placed
                elif is_whole(block.data):
                    found[key] = _Placed(place, replace(self._kept(block), checked=True))
                else:
                    tier.note_corrupt()
        return found

    def _kept(self, block: Stored) -> Stored:
        """The block under its owner's one name, in bytes of its own: of host memory, where that has room."""
        named = replace(block, owner=one_name(block.owner))
        room = None if block.is_owned else self._memory.room_for(block.num_bytes)
        return named.owned() if room is None else named.copied_to(room)

    def _is_copied(self, placed: _Placed) -> bool:
        """Whether nearer tiers are to have it."""
        return placed.place > 0 or placed.block.num_bytes <= self._memory_bytes

    def _promote(self, placed: Mapping[ContentKey, _Placed]) -> None:
        """Copies what lasting tiers had into nearer ones. The lock is held."""
        self._promoted.update(each.place for each in placed.values() if self._is_copied(each))
        self._behind.add_many(
            {key: Waiting(each.block, each.place, anew=False) for key, each in placed.items() if each.place}
        )
        fitting = {key: each.block for key, each in placed.items() if each.block.num_bytes <= self._memory_bytes}
        self._remember(fitting)

    def _remember(self, blocks: Mapping[ContentKey, Stored]) -> None:
        """Puts blocks into memory; what it evicts is for the next tier, unless that has it. The lock is held."""
        evicted = self._memory.put_evicting(blocks)
        if self._lasting:
            self._behind.add_many({key: Waiting(block, 1, anew=False) for key, block in evicted.items()})

    def room_for(self, num_bytes: int) -> memoryview | None:
        """Bytes of host memory, as `contract.Roomy` says."""
        return self._memory.room_for(num_bytes)

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        """Never waits for a lasting tier."""
        copies = {key: self._kept(block) for key, block in blocks.items()}
        with self._lock:
            for read in self._reads:
                read.replaced.update(copies)
            if self._lasting:
                num_tiers = len(self._lasting)
                self._behind.add_many({key: Waiting(block, num_tiers, anew=True) for key, block in copies.items()})
            self._remember(copies)

    def delete_owner(self, owner: str) -> int:
        """Asks every tier, also one that is left alone. Raises ErasureError, when all were asked, if one failed."""
        name = one_name(owner)
        assert name is not None
        with self._lock:
            begun = self._erasures.begin([name])
            counts = [self._forget([name])]
        failed: dict[Source, Exception] = {}
        try:
            with self._behind.between_batches():
                for tier in self._lasting:
                    try:
                        counts.append(tier.delete_owner(name))
                    except Exception as error:
                        failed[tier.tier] = error
        finally:
            with self._lock:
                self._erasures.end(begun)
        if failed:
            raise _not_erased(owner, failed) from next(iter(failed.values()))
        return max(counts)

    def forget(self, owners: Collection[str] | None) -> int:
        """Lets go of what memory and queue have, as `contract.Forgetful` says; lasting tiers are not asked."""
        with self._lock:
            self._erasures.add(owners)
            return self._forget(owners)

    def _forget(self, owners: Collection[str] | None) -> int:
        return max(self._memory.forget(owners), self._behind.forget(owners))

    def stats(self) -> Sequence[TierStats]:
        stats = [replace(each, hits=self._memory_hits) for each in self._memory.stats() if self._memory_bytes]
        for place, tier in enumerate(self._lasting):
            first, *others = tier.stats()
            stats += [
                replace(
                    first,
                    dropped=first.dropped + self._behind.dropped(place),
                    hits=self._hits[place],
                    promoted=self._promoted[place],
                    waiting_bytes=self._behind.num_bytes,
                ),
                *others,
            ]
        return stats

    def flush(self) -> None:
        """Waits until all that was put is written."""
        self._behind.flush()

    def close(self) -> None:
        self._end()

    def check(self) -> None:
        """Asserts that memory and queue agree with themselves."""
        self._memory.check()
        self._behind.check()


def _not_erased(owner: str, failed: Mapping[Source, Exception]) -> ErasureError:
    told = ", ".join(f"{tier} ({type(error).__name__}: {error})" for tier, error in failed.items())
    return ErasureError(
        f"blocks of {owner!r} may be left on the tiers that failed: {told}. Elsewhere they are gone. See that those "
        "tiers work, and erase again"
    )


def _write(lasting: Sequence[GuardedStore], batch: Batch) -> None:
    """Hands a batch to the tiers that it is for."""
    for place, tier in enumerate(lasting):
        meant = {key: waiting for key, waiting in batch.items() if place < waiting.num_tiers}
        there = tier.lookup_many(key for key, waiting in meant.items() if not waiting.anew)
        tier.put_many({key: waiting.block for key, waiting in meant.items() if key not in there})


def _close(behind: WriteBehind, lasting: Sequence[GuardedStore]) -> None:
    """Writes what waits, and closes the tiers."""
    if behind.is_writer():  # the garbage collector calls from wherever it runs, and nobody can wait for himself
        threading.Thread(target=_close, args=(behind, lasting)).start()
        return
    with ExitStack() as ends:
        for tier in lasting:
            ends.callback(tier.close)
        behind.close()
