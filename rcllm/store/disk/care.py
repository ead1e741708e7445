"""The care of a store that is open: every block read and checked, records made to agree, erased bytes overwritten.

Knows nothing of tensors. Invariants: `verify` with `repair` drops only what no reader could have used; after `scrub`
the file holds blocks that can be read, and zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rcllm.core.ranking import ContentKey
from rcllm.errors import StoreError
from rcllm.store.disk import inspect, pages
from rcllm.store.disk.access import Access
from rcllm.store.disk.edit import Edit
from rcllm.store.disk.records import mark, read_entry
from rcllm.store.sealed import CorruptBlockError, open_sealed

OnProgress = Callable[[int, int], None]  # blocks that were read, of how many
_BATCH = 200  # blocks that are read in one transaction, which pins their pages
_RUN_PAGES = 1024  # that are overwritten at once


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found, and what became of it."""

    num_blocks: int  # that were read
    num_bytes: int
    num_damaged: int  # blocks that are not what was put
    differences: tuple[str, ...]  # records that do not agree, in words
    repaired: bool

    @property
    def is_whole(self) -> bool:
        return not self.num_damaged and not self.differences


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """How much of the file was overwritten."""

    num_pages: int
    num_bytes: int


def verify(access: Access, *, repair: bool, on_progress: OnProgress | None) -> Verified:
    dbs = access.opened.dbs
    with access.telling(), access.reading() as txn, txn.cursor(dbs.blocks) as cursor:
        keys = [ContentKey(bytes(key)) for key in cursor.iternext(values=False)]
    damaged: list[ContentKey] = []
    num_bytes = 0
    for first in range(0, len(keys), _BATCH):
        with access.telling(), access.reading() as txn:
            for key in keys[first : first + _BATCH]:
                data = txn.get(key, db=dbs.blocks)
                num_bytes += 0 if data is None else len(data)
                if data is not None and not _is_whole(key, data, txn.get(key, db=dbs.entries)):
                    damaged.append(key)
        if on_progress is not None:
            on_progress(min(first + _BATCH, len(keys)), len(keys))
    with access.telling(), access.reading() as txn:
        differences = inspect.differences(txn, access.opened)
    if access.opened.writable:
        with access.telling(), access.raw_writing():  # so that nobody writes meanwhile
            if wrong := _wrong_first_pages(access):
                differences.append(f"{len(wrong)} blocks have a first page that LMDB must not see")
    repairs = repair and bool(damaged or differences)
    if repairs:
        _repair(access, damaged)
    return Verified(len(keys), num_bytes, len(damaged), tuple(differences), repairs)


def _is_whole(key: ContentKey, data: memoryview, record: memoryview | None) -> bool:
    entry = None if record is None else read_entry(key, bytes(record))
    if entry is None or entry.mark != mark(data[: entry.num_bytes]):
        return False
    try:
        open_sealed(data[: entry.num_bytes])
    except CorruptBlockError:
        return False
    return True


def _repair(access: Access, damaged: list[ContentKey]) -> None:
    with access.telling(), access.raw_writing() as txn:
        _write_at(access, _wrong_first_pages(access))
        access.take_notes()
        edit = Edit(access.opened, txn, access.clock, inspect.recovered_state(txn, access.opened.dbs))
        for key in damaged:
            edit.discard(key)
        inspect.rebuild(txn, access.opened, edit)
        edit.finish()


def _wrong_first_pages(access: Access) -> dict[int, bytes]:
    """What should stand where in the file: LMDB frees as many pages of a value as its first page says."""
    wrong = {}
    with pages.PageFile(access.file) as file:
        newest = file.snapshots()[0]
        for tree in pages.walk(file, newest, newest.main).trees:
            for firsts, counts in pages.walk(file, newest, tree).values:
                for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
                    header = pages.OVERFLOW_HEADER.pack(first, pages.OVERFLOW, count)
                    if file.read(first)[: len(header)] != header:
                        wrong[first * file.page_bytes] = header
    return wrong


def _write_at(access: Access, parts: Mapping[int, bytes]) -> None:
    """In place, in the file."""
    handle = os.open(access.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for place, content in parts.items():
            os.pwrite(handle, content, place)
        os.fsync(handle)
    finally:
        os.close(handle)


def scrub(access: Access) -> tuple[Scrubbed, int]:
    """Fills with zeros every page that neither of the last two transactions reads; how many, and of which erasures.

    In place, while a write transaction keeps all others from taking such a page. A crash at any point leaves the store
    as it was, for no one reads these pages.
    """
    for _ in range(2):  # then both come after whatever was removed
        with access.telling(), access.writing():
            pass
    with access.telling(), access.raw_writing() as txn:
        access.opened.env.sync(True)
        with pages.PageFile(access.file) as file:
            _check_readers(access, file.snapshots()[1].txnid)
            free, page_bytes = pages.unused(file), file.page_bytes
        handle = os.open(access.file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for first, count in _runs(free):
                os.pwrite(handle, bytes(count * page_bytes), first * page_bytes)
            os.fsync(handle)
        finally:
            os.close(handle)
        return Scrubbed(len(free), len(free) * page_bytes), access.state(txn).erasures


def _runs(numbers: pages.Numbers) -> Iterator[tuple[int, int]]:
    """First page and length of each run of pages, at most `_RUN_PAGES` long."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        for start in range(0, len(run), _RUN_PAGES):
            yield int(run[start]), len(run[start : start + _RUN_PAGES])


def _check_readers(access: Access, least: int) -> None:
    """That nobody reads the file as it was before transaction `least`."""
    old = access.old_readers(least)
    if old:
        raise StoreError(
            f"{access.folder}: blocks from before the last removal are in use (process {', '.join(sorted(old))}); "
            "their bytes are overwritten when their requests have ended: run this again"
        )
