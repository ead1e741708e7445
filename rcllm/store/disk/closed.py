"""The care of a store that nobody has open: packed into a smaller file, or saved from one that LMDB cannot read.

Knows nothing of tensors. Invariants: the file is replaced at once, or not at all; nothing of an owner who was ever
erased comes back from pages that are no longer in use.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rcllm.core.ranking import ContentKey
from rcllm.durable import remove, renamed
from rcllm.errors import StoreError
from rcllm.store.contract import Stored
from rcllm.store.disk import audit, pages
from rcllm.store.disk.care import OnProgress, Verified
from rcllm.store.disk.environment import DATA, alone, open_copy, told
from rcllm.store.disk.records import Entry, mark, read_entry
from rcllm.store.disk.store import DiskStore
from rcllm.store.owners import alias
from rcllm.store.sealed import CorruptBlockError, open_sealed

_NO_BUDGET = 1 << 62
_KEY_BYTES = 32
_SLOT = struct.Struct("<H")
_NODE = struct.Struct("<HHHH")  # size, low and high; flags; length of the key


@dataclass(frozen=True, slots=True)
class Compacted:
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """How a store was repaired."""

    num_saved: int | None  # blocks that were found in a file whose trees were broken; None: they were not
    verified: Verified


def compact(folder: Path) -> Compacted:
    """Copies what is in use into a new file, which takes the place of the old one. Raises StoreError."""
    with alone(folder), told(folder):
        before = (folder / DATA).stat().st_size
        opened = open_copy(folder)
        try:
            with renamed(folder / DATA) as partial:
                handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    opened.env.copyfd(handle, compact=True)
                finally:
                    os.close(handle)
        finally:
            opened.close()
        return Compacted(before, (folder / DATA).stat().st_size)


def repair(folder: Path, on_progress: OnProgress | None = None) -> Repaired:
    """Makes a damaged store one that opens, with every block that is whole and whose record can be read."""
    saved = None
    try:
        store = DiskStore.open(folder, _NO_BUDGET)
    except pages.DamagedFileError:
        saved = salvage(folder)
        store = DiskStore.open(folder, _NO_BUDGET)
    with store:
        return Repaired(saved, store.verify(repair=True, on_progress=on_progress))


def salvage(folder: Path) -> int:
    """Reads every page for records and blocks, and puts those that belong together into a new file; how many."""
    with alone(folder), told(folder):
        partial = folder / ".salvage.partial"
        remove(partial)
        with DiskStore.open(partial, _NO_BUDGET) as store, pages.PageFile(folder / DATA) as file:
            _page_size(file)
            entries, runs = _scan(file)
            erased = {each.owner for each in audit.erased_owners(folder)}
            saved = 0
            for key, entry in sorted(entries.items(), key=lambda each: each[1].use):
                data = _whole(file, entry, runs.get(entry.mark, []))
                if data is not None and entry.owner not in erased:
                    store.put_many({key: Stored(data, entry.cost, alias(entry.owner), entry.space)})
                    saved += 1
        (partial / DATA).replace(folder / DATA)
        remove(partial)
        return saved


def _page_size(file: pages.PageFile) -> None:
    try:
        file.snapshots()
    except StoreError:
        file.page_bytes = mmap.PAGESIZE


def _scan(file: pages.PageFile) -> tuple[dict[ContentKey, Entry], dict[int, list[int]]]:
    """The last record of each key, and where values begin, by the mark of their bytes."""
    entries: dict[ContentKey, Entry] = {}
    runs: dict[int, list[int]] = {}
    for number in range(2, file.num_bytes // file.page_bytes):
        page = file.read(number)
        flags = pages.PAGE_HEADER.unpack_from(page)[1] & ~pages.DIRTY
        if flags == pages.LEAF:
            for key, entry in _records(page):
                if key not in entries or entries[key].use < entry.use:
                    entries[key] = entry
        data = memoryview(page)[pages.PAGE_HEADER.size :]
        if bytes(data[:4]) == b"rKVb":
            runs.setdefault(mark(data), []).append(number)
    return entries, runs


def _records(page: bytes) -> Iterator[tuple[ContentKey, Entry]]:
    """Of a page that may be damaged anywhere: a record's own checksum says whether it is one."""
    lower = min(pages.PAGE_HEADER.unpack_from(page)[2], len(page))
    for place in range(pages.PAGE_HEADER.size, lower - 1, _SLOT.size):
        at = _SLOT.unpack_from(page, place)[0]
        if at + _NODE.size + _KEY_BYTES > len(page):
            continue
        low, high, _, key_bytes = _NODE.unpack_from(page, at)
        start = at + _NODE.size + key_bytes
        if key_bytes == _KEY_BYTES and not high and start + low <= len(page):
            key = ContentKey(page[at + _NODE.size : start])
            if (entry := read_entry(key, page[start : start + low])) is not None:
                yield key, entry


def _whole(file: pages.PageFile, entry: Entry, numbers: list[int]) -> memoryview | None:
    for number in numbers:
        count = (entry.num_bytes + pages.PAGE_HEADER.size - 1) // file.page_bytes + 1
        try:
            data = memoryview(file.read(number, count))[pages.PAGE_HEADER.size :][: entry.num_bytes]
            open_sealed(data)
        except (StoreError, CorruptBlockError):
            continue
        return data
    return None
