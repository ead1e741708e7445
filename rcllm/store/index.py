"""What is cached: sizes, owners, pins and a byte budget. Holds no KV and never imports torch.

    0 ≤ pinned bytes ≤ used bytes = Σ entry bytes ≤ budget

Room is made before a block is added, so the budget holds at every moment. Not thread-safe: the pool locks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from rcllm.core.ranking import ContentKey
from rcllm.errors import CapacityError
from rcllm.store.evict import GreedyDual
from rcllm.store.owners import is_among


@dataclass(frozen=True, slots=True)
class Entry:
    num_bytes: int
    cost: float  # of computing it again, in FLOPs
    owner: str | None  # item id or user id; whoever is erased


class Index:
    """Entries by content key, within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.evictions = 0
        self._added = 0  # bytes, since the beginning
        self._entries: dict[ContentKey, Entry] = {}
        self._pins: dict[ContentKey, int] = {}
        self._pinned = 0  # bytes of entries that are listed and pinned
        self._order = GreedyDual()

    @property
    def freed(self) -> int:
        """Bytes that were listed once and are no more."""
        return self._added - self.used

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ContentKey]:
        return iter(self._entries)

    def __getitem__(self, key: ContentKey) -> Entry:
        return self._entries[key]

    def touch(self, key: ContentKey) -> None:
        """Notes a use."""
        entry = self._entries[key]
        self._order.touch(key, entry.cost / max(entry.num_bytes, 1))

    def pin(self, key: ContentKey) -> None:
        """Keeps an entry from eviction until `unpin` was called as often."""
        assert key in self._entries
        count = self._pins.get(key, 0)
        if not count:
            self._pinned += self._entries[key].num_bytes
        self._pins[key] = count + 1

    def take(self, keys: Iterable[ContentKey]) -> list[ContentKey]:
        """Those of `keys` that are listed: notes a use of each, and pins it."""
        listed = [key for key in keys if key in self._entries]
        for key in listed:
            self.touch(key)
            self.pin(key)
        return listed

    def unpin(self, key: ContentKey) -> None:
        count = self._pins.get(key, 0)
        assert count > 0, "unpinned more often than pinned"
        if count > 1:
            self._pins[key] = count - 1
            return
        del self._pins[key]
        if key in self._entries:
            self._pinned -= self._entries[key].num_bytes
            self._order.release(key)

    def is_pinned(self, key: ContentKey) -> bool:
        """Also of an entry that was removed, as long as somebody holds it."""
        return key in self._pins

    def make_room(self, num_bytes: int) -> list[ContentKey]:
        """Evicts until `num_bytes` fit, and returns who went.

        Raises CapacityError, with nothing evicted, when the pinned entries leave too little.
        """
        if self._pinned + num_bytes > self.budget:
            raise CapacityError(
                f"{num_bytes / 1e6:.1f} MB of KV do not fit: of the pool's {self.budget / 1e6:.1f} MB, "
                f"{self._pinned / 1e6:.1f} MB are in use by running requests. Give the cache more memory "
                "(cache.memory_mb), keep it in fewer bits (cache.kv_dtype = 'int8'), or send fewer candidates at once"
            )
        gone = []
        while self.used + num_bytes > self.budget:
            victim = self.evict()
            assert victim is not None, "unpinned bytes without an entry to evict"
            gone.append(victim)
        return gone

    def evict(self) -> ContentKey | None:
        """Drops the entry that is missed least; None where all are pinned."""
        victim = self._order.pop(self._pins)
        if victim is not None:
            self.used -= self._entries.pop(victim).num_bytes
            self.evictions += 1
        return victim

    def add(self, key: ContentKey, entry: Entry) -> None:
        """Adds an entry for which room was made."""
        assert key not in self._entries
        assert self.used + entry.num_bytes <= self.budget
        self._entries[key] = entry
        if key in self._pins:  # of an entry that was dropped and is still read
            self._pinned += entry.num_bytes
        self.used += entry.num_bytes
        self._added += entry.num_bytes
        self.touch(key)

    def remove(self, key: ContentKey) -> None:
        """Drops an entry. What a running request has pinned of it lives on, unlisted, until that request ends."""
        num_bytes = self._entries.pop(key).num_bytes
        self.used -= num_bytes
        if key in self._pins:
            self._pinned -= num_bytes
        self._order.forget(key)

    def owned_by(self, owners: Collection[str] | None) -> list[ContentKey]:
        """The entries of some owners; None: of all that have one."""
        return [key for key, entry in self._entries.items() if is_among(entry.owner, owners)]

    def check(self) -> None:
        """Asserts the invariant."""
        total = sum(entry.num_bytes for entry in self._entries.values())
        numbers = f"used {self.used}, sum {total}, budget {self.budget}, {len(self)} entries, {len(self._pins)} pinned"
        assert self.used == total <= self.budget, numbers
        pinned = sum(self._entries[key].num_bytes for key in self._pins if key in self._entries)
        assert self._pinned == pinned, f"{self._pinned} bytes counted as pinned, {pinned} are; {numbers}"
        assert all(count > 0 for count in self._pins.values()), numbers
        self._order.check(set(self._entries))
