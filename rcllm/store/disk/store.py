"""Disk as a tier: blocks in one LMDB file, read where it is mapped, shared by the processes of a machine.

A crash at any point leaves the file as its last transaction did. Writers take turns; readers never wait. Knows nothing
of tensors. Invariants: content and budget are counted in the file, so that all who write to it agree; a block that was
handed out stays as it was until its last view dies, whatever is evicted, replaced or erased meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from rcllm.core.ranking import ContentKey
from rcllm.errors import StoreError
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.disk import ahead, inspect, reserve
from rcllm.store.disk.audit import Erasure, append
from rcllm.store.disk.edit import NUMBER, Edit, Removed, read_erasure
from rcllm.store.disk.environment import DATA, Opened, open_environment, told
from rcllm.store.disk.lease import Leases
from rcllm.store.disk.records import Entry, State, mark, read_entry, read_state
from rcllm.store.owners import NOBODY, OwnerDigest, alias, digest

T = TypeVar("T")
_BATCH_BYTES = 64 << 20  # LMDB keeps what a transaction writes in memory until it ends
_SLACK_BYTES = 1 << 20  # a disk with less room than this is full
_MAX_TOUCHES = 100_000  # uses that wait for the next write


class StoreWarning(UserWarning):
    """A store goes on with less than it was asked for."""


@dataclass(frozen=True, slots=True)
class Erased:
    """Which owners any process erased since a number was told."""

    now: int  # tell this the next time
    owners: frozenset[OwnerDigest]
    complete: bool  # False: some are no longer remembered, so whoever holds blocks in memory lets all of them go


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What a store takes from its machine."""

    file_bytes: int  # of the file, with pages that wait to be used again
    map_bytes: int  # address space: no file grows beyond it
    num_leases: int  # transactions of this process that keep blocks in place
    oldest_lease_s: float
    writable: bool
    in_place: bool  # False: blocks are copied out


class DiskStore:
    """At most `budget_bytes` of blocks in `folder`. Use `DiskStore.open`, a context manager."""

    def __init__(self, folder: Path, budget_bytes: int, clock: Callable[[], float], opened: Opened) -> None:
        self.folder, self._budget, self._clock, self._opened = folder, budget_bytes, clock, opened
        self._leases = Leases(opened.env, clock, opened.close)
        self._writer = threading.Lock()  # of this process; LMDB's own lets one process write at a time
        self._notes = threading.Lock()
        self._pid = os.getpid()
        self._fits = budget_bytes  # what the disk has room for, where it was once found full
        self._touches: dict[ContentKey, None] = {}  # in order of their last use
        self._bad: set[ContentKey] = set()  # to be dropped with the next write
        self._evictions = self._dropped = self._errors = 0

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], budget_bytes: int, *, clock: Callable[[], float] = time.time
    ) -> DiskStore:
        """Makes what is missing. A folder that cannot be written is read alone, with a warning. Raises StoreError."""
        where = Path(folder)
        if budget_bytes < 0:
            raise StoreError(f"{where}: expected a budget of 0 bytes or more, got {budget_bytes}")
        opened = open_environment(where)
        if not opened.writable:
            _warn(f"{where}: cannot be written, so its blocks are read, and none is added or erased")
        else:
            reserve.keep(where)
        return cls(where, budget_bytes, clock, opened)

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the contract ----

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        found: dict[ContentKey, Found] = {}
        with self._telling(), self._reading() as txn:
            dbs = self._opened.dbs
            for key in keys:
                entry = self._entry(txn, key)
                if entry is not None and (data := txn.get(key, db=dbs.blocks)) is not None:
                    found[key] = Found("disk", entry.num_bytes)
                    ahead.announce(data)
        return found

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        found: dict[ContentKey, Stored] = {}
        with self._telling():
            lease = self._leases.begin()
            for key in keys:
                entry = self._entry(lease.txn, key)
                data = None if entry is None else self._block(lease.txn, key, entry)
                if entry is None or data is None:
                    continue
                view = lease.lend(data) if self._opened.in_place else memoryview(bytes(data))
                found[key] = Stored(view, entry.cost, alias(entry.owner), entry.space)
            self._note_uses(found)
        return found

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        for batch in _batches(blocks):
            try:
                with self._telling(), self._writing() as edit:
                    taken = [edit.put(key, block, self.budget_bytes) for key, block in batch.items()]
                self._drop(taken.count(False))
            except StoreError as error:
                self._drop(len(batch))
                num_bytes = sum(block.num_bytes for block in batch.values())
                if not self._is_full(error, num_bytes):
                    raise
                self._found_full(num_bytes)

    def delete_owner(self, owner: str) -> int:
        return self.delete_owners([owner]).num_blocks

    def delete_owners(self, owners: Iterable[str]) -> Removed:
        """Removes every block of several items or users, in one transaction. It is on the disk when this returns."""
        unique = list(dict.fromkeys(map(digest, owners)))
        erased = self._whatever_the_room(lambda: self._erase(unique))
        self._whatever_the_room(lambda: append(self.folder, erased, self._clock()))
        return Removed(sum(each.blocks for each in erased), sum(each.bytes for each in erased))

    def stats(self) -> Sequence[TierStats]:
        state = self._state()
        counts = (self._evictions, self._dropped, self._errors)
        return (TierStats("disk", state.num_blocks, state.num_bytes, self.budget_bytes, *counts),)

    def close(self) -> None:
        """Blocks that are in use stay in place; the file is let go when the last of them is."""
        if os.getpid() != self._pid:
            return
        if self._opened.writable and (self._touches or self._bad):
            with contextlib.suppress(StoreError), self._telling(), self._writing():
                pass
        self._leases.close()

    # ---- beyond the contract ----

    @property
    def budget_bytes(self) -> int:
        """What it may keep; less than was asked for where the disk was found full."""
        return min(self._budget, self._fits)

    def set_budget(self, budget_bytes: int) -> None:
        """More or less than before. What is too much goes with the next write."""
        self._budget = self._fits = budget_bytes

    def use(self) -> DiskUse:
        opened = self._opened
        size = (self.folder / DATA).stat().st_size
        return DiskUse(
            size, opened.map_bytes, len(self._leases), self._leases.oldest_s(), opened.writable, opened.in_place
        )

    def erased_since(self, number: int) -> Erased:
        """Owners that any process erased after `number`, which is 0 or what the last call said is now."""
        owners = set()
        with self._telling(), self._reading() as txn:
            now = self._state_of(txn).erasures
            with txn.cursor(self._opened.dbs.erasures) as cursor:
                found = cursor.set_range(NUMBER.pack(number + 1))
                while found:
                    owners.add(read_erasure(bytes(cursor.value()))[0])
                    found = cursor.next()
                oldest = NUMBER.unpack(bytes(cursor.key()))[0] if cursor.first() else now + 1
        return Erased(now, frozenset(owners), oldest <= number + 1)

    def check(self) -> None:
        """Asserts that all records agree. Reads every key, and no block."""
        with self._telling(), self._reading() as txn:
            found = inspect.differences(txn, self._opened)
        assert not found, "; ".join(found)

    # ---- inside ----

    def _erase(self, owners: Iterable[OwnerDigest]) -> list[Erasure]:
        erased = []
        with self._writing() as edit:
            for owner in owners:
                gone = edit.remove_owner(owner)
                number = edit.note_erasure(owner)
                erased.append(Erasure(number, alias(owner), gone.num_blocks, gone.num_bytes, scrubbed=False))
        self._opened.env.sync(True)
        return erased

    def _whatever_the_room(self, act: Callable[[], T]) -> T:
        """What `act` returns; where the disk is full, once more with the room that was kept for it."""
        try:
            with self._telling():
                return act()
        except StoreError as error:
            if not self._is_full(error, 0) or not reserve.release(self.folder):
                raise
        with self._telling():
            return act()

    def _entry(self, txn: Any, key: ContentKey) -> Entry | None:
        """None: not there, damaged, or its owner could not find it to erase it."""
        record = txn.get(key, db=self._opened.dbs.entries)
        if record is None:
            return None
        entry = read_entry(key, bytes(record))
        if entry is None or (entry.owner != NOBODY and txn.get(entry.owner + key, db=self._opened.dbs.owners) is None):
            self._found_bad(key)
            return None
        return entry

    def _block(self, txn: Any, key: ContentKey, entry: Entry) -> memoryview | None:
        """The bytes that the record vouches for; whether they are whole is for their reader to check."""
        data: memoryview | None = txn.get(key, db=self._opened.dbs.blocks)
        if data is None or len(data) != max(entry.num_bytes, self._opened.least_bytes):
            self._found_bad(key)
            return None
        data = data[: entry.num_bytes]
        if mark(data) != entry.mark:
            self._found_bad(key)
            return None
        return data

    def _found_bad(self, key: ContentKey) -> None:
        with self._notes:
            if key not in self._bad:
                self._bad.add(key)
                self._errors += 1

    def _note_uses(self, keys: Iterable[ContentKey]) -> None:
        with self._notes:
            for key in keys:
                self._touches.pop(key, None)
                self._touches[key] = None
            while len(self._touches) > _MAX_TOUCHES:
                del self._touches[next(iter(self._touches))]

    def _take_notes(self) -> tuple[Iterable[ContentKey], Iterable[ContentKey]]:
        with self._notes:
            touches, bad = self._touches, self._bad
            self._touches, self._bad = {}, set()
        return touches, bad

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._opened.env.begin(buffers=True) as txn:
            yield txn

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Edit]:
        """One write transaction, after the uses and the finds that wait for one. Nothing counts if its body raises."""
        if not self._opened.writable:
            raise StoreError(f"{self.folder}: cannot be written; give its folder rights, or name another")
        with self._writer:
            touches, bad = self._take_notes()
            with self._opened.env.begin(write=True, buffers=True) as txn:
                edit = Edit(self._opened, txn, self._clock)
                for key in bad:
                    edit.remove(key)
                for key in touches:
                    edit.touch(key)
                yield edit
                edit.finish()
            self._evictions += edit.evictions

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever fails is counted, and is an error of ours."""
        if os.getpid() != self._pid:
            raise StoreError(f"{self.folder}: opened by process {self._pid}; a fork of it opens the store for itself")
        try:
            with told(self.folder):
                yield
        except StoreError:
            with self._notes:
                self._errors += 1
            raise

    def _drop(self, num_blocks: int) -> None:
        with self._notes:
            self._dropped += num_blocks

    def _state(self) -> State:
        with self._telling(), self._reading() as txn:
            return self._state_of(txn)

    def _state_of(self, txn: Any) -> State:
        state = read_state(txn.get(b"state", db=self._opened.dbs.facts))
        if state is None:
            raise StoreError(f"{self.folder}: the store's totals are damaged; repair it: rcllm cache verify --repair")
        return state

    def _is_full(self, error: StoreError, num_bytes: int) -> bool:
        """Whether the disk, or the map, had no room for so much."""
        cause = error.__cause__
        code = cause.errno if isinstance(cause, OSError) else getattr(cause, "code", None)
        if code == errno.EIO:  # LMDB says so where less was written than it asked for
            disk = os.statvfs(self.folder)
            return disk.f_bavail * disk.f_frsize < 2 * num_bytes + _SLACK_BYTES
        return isinstance(cause, lmdb.MapFullError) or code in (errno.ENOSPC, errno.EDQUOT)

    def _found_full(self, num_bytes: int) -> None:
        """Keeps less from now on, so that what is put next finds pages of what went."""
        self._fits = max(0, min(self.budget_bytes, self._state().num_bytes) - num_bytes)
        _warn(
            f"{self.folder}: the disk is full, so blocks were dropped and the store keeps {self._fits / 1e6:.0f} MB; "
            "make room and open it again, or lower store.disk_gb"
        )
        for _ in range(2):  # LMDB uses pages again from the second transaction on after the one that freed them
            with contextlib.suppress(StoreError), self._telling(), self._writing() as edit:
                edit.make_room(0, self.budget_bytes)


def _batches(blocks: Mapping[ContentKey, Stored]) -> Iterator[dict[ContentKey, Stored]]:
    """In order, each of at most `_BATCH_BYTES` or of one block."""
    batch: dict[ContentKey, Stored] = {}
    size = 0
    for key, block in blocks.items():
        if batch and size + block.num_bytes > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
        batch[key] = block
        size += block.num_bytes
    if batch:
        yield batch


def _warn(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=3)
