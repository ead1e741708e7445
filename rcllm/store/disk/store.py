"""Disk as a tier: blocks in one LMDB file, read where it is mapped, shared by the processes of a machine.

A crash at any point leaves the file as its last transaction did. Writers take turns; readers never wait. Knows nothing
of tensors. Invariants: content and budget are counted in the file, so that all who write to it agree; a block that was
handed out stays as it was until its last view dies, whatever is evicted, replaced or erased meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lmdb

from rcllm.core.ranking import ContentKey
from rcllm.errors import StoreError, StoreWarning
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.disk import ahead, care, inspect, reserve, spaces, travel
from rcllm.store.disk.access import Access
from rcllm.store.disk.audit import Erasure, append
from rcllm.store.disk.edit import NUMBER, Removed, read_erasure
from rcllm.store.disk.environment import Opened, open_environment
from rcllm.store.disk.lease import Leases
from rcllm.store.owners import OwnerDigest, alias, digest

T = TypeVar("T")
_BATCH_BYTES = 64 << 20  # LMDB keeps what a transaction writes in memory until it ends
_GROWTH_BYTES = 256 << 20  # beyond twice its budget, what a file may grow while blocks are read that were removed
_AHEAD_BYTES = 1 << 30  # of one look-up that the system is asked to bring in; who asks for more reads a catalogue
_SLACK_BYTES = 1 << 20  # a disk with less room than this is full


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
        self.folder, self._budget = folder, budget_bytes
        self._fits = budget_bytes  # what the disk has room for, where it was once found full
        self._access = Access(folder, opened, clock)
        self._leases = Leases(opened.env, clock, opened.close)

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
        access, announced = self._access, 0
        with access.telling(), access.reading() as txn:
            for key in keys:
                if (entry := access.entry(txn, key)) is None:
                    continue
                announced += entry.num_bytes
                if announced <= _AHEAD_BYTES:  # py-lmdb reads all pages of a value that it returns
                    if (data := txn.get(key, db=access.opened.dbs.blocks)) is None:
                        continue
                    ahead.announce(data)
                found[key] = Found("disk", entry.num_bytes)
        return found

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        found: dict[ContentKey, Stored] = {}
        access = self._access
        with access.telling():
            lease = self._leases.begin()
            for key in keys:
                entry = access.entry(lease.txn, key)
                data = None if entry is None else access.block(lease.txn, key, entry)
                if entry is None or data is None:
                    continue
                view = lease.lend(data) if access.opened.in_place else memoryview(bytes(data))
                found[key] = Stored(view, entry.cost, alias(entry.owner), entry.space)
            access.note_uses(found)
        return found

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        for batch in _batches(blocks):
            if self._is_held_back():
                self._access.drop(len(batch))
                continue
            try:
                with self._access.telling(), self._access.writing() as edit:
                    taken = [edit.put(key, block, self.budget_bytes) for key, block in batch.items()]
                self._access.drop(taken.count(False))
            except StoreError as error:
                self._access.drop(len(batch))
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
        self._audit(erased)
        return Removed(sum(each.blocks for each in erased), sum(each.bytes for each in erased))

    def stats(self) -> Sequence[TierStats]:
        access = self._access
        with access.telling(), access.reading() as txn:
            state = access.state(txn)
        counts = (access.evictions, access.dropped, access.errors)
        return (TierStats("disk", state.num_blocks, state.num_bytes, self.budget_bytes, *counts),)

    def close(self) -> None:
        """Blocks that are in use stay in place; the file is let go when the last of them is. Again: does nothing."""
        if not self._access.is_fork and not self._leases.are_closed:
            self._access.flush()
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
        opened, leases = self._access.opened, self._leases
        size = self._access.file.stat().st_size
        return DiskUse(size, opened.map_bytes, len(leases), leases.oldest_s(), opened.writable, opened.in_place)

    def erased_since(self, number: int) -> Erased:
        """Owners that any process erased after `number`, which is 0 or what the last call said is now."""
        owners = set()
        access = self._access
        with access.telling(), access.reading() as txn:
            now = access.state(txn).erasures
            with txn.cursor(access.opened.dbs.erasures) as cursor:
                found = cursor.set_range(NUMBER.pack(number + 1))
                while found:
                    owners.add(read_erasure(bytes(cursor.value())).owner)
                    found = cursor.next()
                oldest = NUMBER.unpack(bytes(cursor.key()))[0] if cursor.first() else now + 1
        return Erased(now, frozenset(owners), oldest <= number + 1)

    def name_space(self, space: str, about: Mapping[str, str]) -> None:
        """What blocks of a space are made by, for people: model, template, dtype."""
        with self._access.telling(), self._access.writing() as edit:
            edit.name_space(space, about)

    def spaces(self) -> Mapping[str, spaces.Space]:
        with self._access.telling(), self._access.reading() as txn:
            return spaces.read_all(txn, self._access.opened.dbs)

    def prune(self, keep: Collection[str]) -> Removed:
        """Removes the blocks of all other spaces, and what is known of these."""
        return spaces.prune(self._access, keep)

    def remove_many(self, keys: Iterable[ContentKey]) -> Removed:
        """Removes those of `keys` that it has, in transactions that let others write in between."""
        return spaces.remove_all(self._access, keys)

    def verify(self, *, repair: bool, on_progress: care.OnProgress | None = None) -> care.Verified:
        """Reads every block. With `repair`: drops those that are damaged, and makes all records agree."""
        return care.verify(self._access, repair=repair, on_progress=on_progress)

    def scrub(self) -> care.Scrubbed:
        """Overwrites whatever was removed, so that no byte of it is in the file. Raises StoreError while it is read."""
        scrubbed, erasures = care.scrub(self._access)
        self._audit([Erasure(erasures, None, scrubbed.num_pages, scrubbed.num_bytes, scrubbed=True)])
        return scrubbed

    def export_to(self, folder: Path) -> travel.Manifest:
        """A copy to take elsewhere, with a manifest, of the store as it is now; others go on using it."""
        return travel.export_to(self._access, folder)

    def import_from(self, folder: Path) -> travel.Imported:
        """Takes the blocks of an export, each of them checked. Raises StoreError for what is no whole export."""
        return travel.import_from(self._access, folder, self.put_many)

    def check(self) -> None:
        """Asserts that all records agree. Reads every key, and no block."""
        with self._access.telling(), self._access.reading() as txn:
            found = inspect.differences(txn, self._access.opened)
        assert not found, "; ".join(found)

    # ---- inside ----

    def _erase(self, owners: Iterable[OwnerDigest]) -> list[Erasure]:
        erased = []
        with self._access.writing() as edit:
            for owner in owners:
                gone = edit.remove_owner(owner)
                number = edit.note_erasure(owner)
                erased.append(Erasure(number, alias(owner), gone.num_blocks, gone.num_bytes, scrubbed=False))
        self._access.opened.env.sync(True)
        return erased

    def _audit(self, erasures: Sequence[Erasure]) -> None:
        self._whatever_the_room(lambda: append(self.folder, erasures, self._access.clock()))

    def _whatever_the_room(self, act: Callable[[], T]) -> T:
        """What `act` returns; where the disk is full, once more with the room that was kept for it."""
        try:
            with self._access.telling():
                return act()
        except StoreError as error:
            if not self._is_full(error, 0) or not reserve.release(self.folder):
                raise
        with self._access.telling():
            return act()

    def _is_held_back(self) -> bool:
        """Whether the file has outgrown its budget because somebody reads what was removed: then nothing is added."""
        if self._access.file.stat().st_size <= 2 * self._budget + _GROWTH_BYTES:
            return False
        env = self._access.opened.env
        old = self._access.old_readers(env.info()["last_txnid"] - 1)
        if old:
            _warn(
                f"{self.folder}: blocks that were removed are in use (process {', '.join(sorted(old))}), and the file "
                "has outgrown its budget for them; until they are let go, blocks are dropped"
            )
        return bool(old)

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
        self._fits = max(0, min(self.budget_bytes, self.stats()[0].num_bytes) - num_bytes)
        _warn(
            f"{self.folder}: the disk is full, so blocks were dropped and the store keeps {self._fits / 1e6:.0f} MB; "
            "make room and open it again, or give it a smaller budget"
        )
        for _ in range(2):  # LMDB uses pages again from the second transaction on after the one that freed them
            with contextlib.suppress(StoreError), self._access.telling(), self._access.writing() as edit:
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
