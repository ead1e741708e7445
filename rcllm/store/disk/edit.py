"""One write transaction: blocks put, used and removed, with every record beside them kept in step.

    entries = blocks = order, key for key          state.num_bytes = Σ entries' bytes = Σ spaces' bytes

Knows nothing of threads, leases or files. Invariant: what is committed satisfies the lines above, and a transaction
that ends any other way changes nothing.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rcllm.core.ranking import ContentKey
from rcllm.errors import StoreError
from rcllm.store.contract import Stored
from rcllm.store.disk.environment import Opened
from rcllm.store.disk.lease import address_of
from rcllm.store.disk.pages import DIRTY, OVERFLOW, OVERFLOW_HEADER
from rcllm.store.disk.records import Entry, State, mark, rank_key, read_entry, read_state, write_entry, write_state
from rcllm.store.owners import DIGEST_BYTES, NOBODY, OwnerDigest, digest

NUMBER = struct.Struct(">Q")  # of an erasure
_ERASED = struct.Struct(f"<{DIGEST_BYTES}sd")  # owner, and when
MAX_ERASURES = 100_000  # that are remembered


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed."""

    num_blocks: int = 0
    num_bytes: int = 0

    def __add__(self, other: Removed) -> Removed:
        return Removed(self.num_blocks + other.num_blocks, self.num_bytes + other.num_bytes)


class Edit:
    """Changes within one write transaction. Nothing counts before `finish`."""

    def __init__(self, opened: Opened, txn: Any, now: Callable[[], float], state: State | None = None) -> None:
        self._opened, self._dbs, self._txn, self._now = opened, opened.dbs, txn, now
        state = state or read_state(txn.get(b"state", db=self._dbs.facts))
        if state is None:
            raise StoreError("the store's totals are damaged; repair it: rcllm cache verify --repair")
        self.state = state
        self.evictions = 0
        self._new: set[ContentKey] = set()  # put in this transaction
        self._spaces: dict[str, Removed] = {}  # what was added, less what was removed

    def entry(self, key: ContentKey) -> Entry | None:
        record = self._txn.get(key, db=self._dbs.entries)
        return None if record is None else read_entry(key, bytes(record))

    def put(self, key: ContentKey, block: Stored, budget: int) -> bool:
        """In place of what is there, evicting others; False where it is larger than the whole budget."""
        self.remove(key)
        if block.num_bytes > budget:
            return False
        self.make_room(block.num_bytes, budget)
        self._delete_value(key)
        data: Any = block.data
        if block.num_bytes < self._opened.least_bytes:
            data = bytes(data).ljust(self._opened.least_bytes, b"\0")
        self._txn.put(key, data, db=self._dbs.blocks)
        self._new.add(key)
        entry = Entry(block.num_bytes, block.cost, 0.0, 0, mark(block.data), digest(block.owner), block.space)
        self._rank(key, entry)
        if entry.owner != NOBODY:
            self._txn.put(entry.owner + key, b"", db=self._dbs.owners)
        self._count(entry, 1)
        return True

    def touch(self, key: ContentKey) -> None:
        """Notes a use."""
        if (entry := self.entry(key)) is not None:
            self._txn.delete(entry.rank(key), db=self._dbs.order)
            self._rank(key, entry)
            self._spaces.setdefault(entry.space, Removed())

    def _rank(self, key: ContentKey, entry: Entry) -> None:
        self.state = replace(self.state, uses=self.state.uses + 1)
        ranked = replace(entry, priority=self.state.clock + entry.cost_per_byte, use=self.state.uses)
        self._txn.put(key, write_entry(key, ranked), db=self._dbs.entries)
        self._txn.put(ranked.rank(key), b"", db=self._dbs.order)

    def make_room(self, num_bytes: int, budget: int) -> None:
        """Evicts what costs least per byte to compute again, until `num_bytes` more fit."""
        if self.state.num_bytes + num_bytes <= budget:
            return
        with self._txn.cursor(self._dbs.order) as order:
            while self.state.num_bytes + num_bytes > budget and order.first():
                rank = bytes(order.key())
                key = rank_key(rank)
                entry = self.entry(key)
                if entry is None or entry.rank(key) != rank:  # of a record that was damaged
                    self._txn.delete(rank, db=self._dbs.order)
                    continue
                self.state = replace(self.state, clock=max(self.state.clock, entry.priority))
                self.remove(key)
                self.evictions += 1

    def remove(self, key: ContentKey) -> Removed:
        """A block and all that is known of it; nothing where it is not there, or its record is damaged."""
        entry = self.entry(key)
        if entry is None:
            return Removed()
        self._delete_value(key)
        self._txn.delete(key, db=self._dbs.entries)
        self._txn.delete(entry.rank(key), db=self._dbs.order)
        if entry.owner != NOBODY:
            self._txn.delete(entry.owner + key, db=self._dbs.owners)
        self._count(entry, -1)
        return Removed(1, entry.num_bytes)

    def _delete_value(self, key: ContentKey) -> None:
        """LMDB frees as many pages as the value's first page says, so that page must be right."""
        value = self._txn.get(key, db=self._dbs.blocks)
        if value is None:
            return
        header = ctypes.string_at(address_of(value) - OVERFLOW_HEADER.size, OVERFLOW_HEADER.size)
        pages = (OVERFLOW_HEADER.size + len(value) - 1) // self._opened.page_bytes + 1
        flags = OVERFLOW | DIRTY if key in self._new else OVERFLOW
        if OVERFLOW_HEADER.unpack(header)[1:] != (flags, pages):
            raise StoreError("a page of a block is damaged; repair the store: rcllm cache verify --repair")
        del value
        self._txn.delete(key, db=self._dbs.blocks)
        self._new.discard(key)

    def discard(self, key: ContentKey) -> None:
        """A block and its record, whatever they say; what else names them is for `inspect.rebuild` to put right."""
        self._delete_value(key)
        self._txn.delete(key, db=self._dbs.entries)

    def remove_owner(self, owner: OwnerDigest) -> Removed:
        removed = Removed()
        for key in list(self._owned(owner)):
            removed += self.remove(key)
        return removed

    def _owned(self, owner: OwnerDigest) -> Iterator[ContentKey]:
        with self._txn.cursor(self._dbs.owners) as owners:
            found = owners.set_range(owner)
            while found and bytes(owners.key()).startswith(owner):
                yield ContentKey(bytes(owners.key())[len(owner) :])
                found = owners.next()

    def note_erasure(self, owner: OwnerDigest) -> int:
        """Remembers that an owner was erased, for those who hold blocks of it in memory; returns its number."""
        number = self.state.erasures + 1
        self.state = replace(self.state, erasures=number)
        self._txn.put(NUMBER.pack(number), _ERASED.pack(owner, self._now()), db=self._dbs.erasures)
        if number > MAX_ERASURES:
            self._txn.delete(NUMBER.pack(number - MAX_ERASURES), db=self._dbs.erasures)
        return number

    def name_space(self, space: str, about: Mapping[str, str]) -> None:
        record = self._space(space) | {"about": dict(about), "used": self._now()}
        self._txn.put(space_key(space), json.dumps(record).encode(), db=self._dbs.spaces)

    def forget_spaces(self, spaces: Iterable[str]) -> None:
        """Those that have no block."""
        for space in spaces:
            self._txn.delete(space_key(space), db=self._dbs.spaces)
            self._spaces.pop(space, None)

    def recount_spaces(self, counts: Mapping[str, Removed]) -> None:
        """Sets what every space has: nothing, where it is not in `counts`."""
        with self._txn.cursor(self._dbs.spaces) as cursor:
            known = {space_of(bytes(key)) for key in cursor.iternext(values=False)}
        for space in known | counts.keys():
            held = counts.get(space, Removed())
            record = self._space(space) | {"blocks": held.num_blocks, "bytes": held.num_bytes}
            self._txn.put(space_key(space), json.dumps(record).encode(), db=self._dbs.spaces)
        self._spaces = {}

    def empty_spaces(self) -> list[str]:
        with self._txn.cursor(self._dbs.spaces) as cursor:
            names = [space_of(bytes(key)) for key in cursor.iternext(values=False)]
        return [name for name in names if not self._space(name)["blocks"]]

    def finish(self) -> None:
        """Writes the totals; commit afterwards."""
        for space, more in self._spaces.items():
            record = self._space(space)
            record["blocks"] += more.num_blocks
            record["bytes"] += more.num_bytes
            record["used"] = self._now()
            self._txn.put(space_key(space), json.dumps(record).encode(), db=self._dbs.spaces)
        self._txn.put(b"state", write_state(self.state), db=self._dbs.facts)

    def _space(self, space: str) -> dict[str, Any]:
        return read_space(self._txn.get(space_key(space), db=self._dbs.spaces))

    def _count(self, entry: Entry, sign: int) -> None:
        state = self.state
        num_bytes = sign * entry.num_bytes
        self.state = replace(state, num_blocks=state.num_blocks + sign, num_bytes=state.num_bytes + num_bytes)
        self._spaces[entry.space] = self._spaces.get(entry.space, Removed()) + Removed(sign, num_bytes)


def space_key(space: str) -> bytes:
    """LMDB has no empty key."""
    return b"/" + space.encode("utf-8", "surrogatepass")


def read_space(record: bytes | memoryview | None) -> dict[str, Any]:
    """An empty one where there is none, or it is damaged: then `inspect.rebuild` counts anew."""
    empty: dict[str, Any] = {"about": {}, "blocks": 0, "bytes": 0, "used": 0.0}
    try:
        return empty if record is None else empty | json.loads(bytes(record))
    except (ValueError, TypeError):
        return empty


def space_of(key: bytes) -> str:
    return key[1:].decode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class ErasedOwner:
    """Whom somebody erased, and when."""

    owner: OwnerDigest
    when: float


def read_erasure(record: bytes) -> ErasedOwner:
    owner, when = _ERASED.unpack(record)
    return ErasedOwner(OwnerDigest(owner), when)
