"""Transactions on one open store, the uses and finds that wait for the next write, and the counts of what went wrong.

Knows nothing of budgets or of the contract. Invariants: writers of this process take turns; whatever fails is counted
and is an error of ours; nothing is done in a fork of the process that opened it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rcllm.core.ranking import ContentKey
from rcllm.errors import StoreError
from rcllm.store.disk.edit import Edit
from rcllm.store.disk.environment import DATA, Opened, told
from rcllm.store.disk.records import Entry, State, mark, read_entry, read_state
from rcllm.store.owners import NOBODY

_MAX_TOUCHES = 100_000  # uses that wait for the next write


class Access:
    """How the parts of a store get at it."""

    def __init__(self, folder: Path, opened: Opened, clock: Callable[[], float]) -> None:
        self.folder, self.opened, self.clock = folder, opened, clock
        self.evictions = self.dropped = self.errors = 0
        self._pid = os.getpid()
        self._writer = threading.Lock()  # of this process; LMDB's own lets one process write at a time
        self._notes = threading.Lock()
        self._last_page = 0  # of the file, when it was last looked for
        self._touches: dict[ContentKey, None] = {}  # in order of their last use
        self._bad: set[ContentKey] = set()  # to be dropped with the next write

    @property
    def file(self) -> Path:
        return self.folder / DATA

    @property
    def is_fork(self) -> bool:
        return os.getpid() != self._pid

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever fails is counted, and is an error of ours."""
        if self.is_fork:
            raise StoreError(f"{self.folder}: opened by process {self._pid}; a fork of it opens the store for itself")
        try:
            with told(self.folder):
                yield
        except StoreError:
            with self._notes:
                self.errors += 1
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        with self.opened.env.begin(buffers=True) as txn:
            yield txn

    @contextlib.contextmanager
    def writing(self) -> Iterator[Edit]:
        """One write transaction, after the uses and the finds that wait for one. Nothing counts if its body raises."""
        with self.raw_writing() as txn:
            touches, bad = self.take_notes()
            edit = Edit(self.opened, txn, self.clock)
            for key in bad:
                edit.remove(key)
            for key in touches:
                edit.touch(key)
            yield edit
            edit.finish()
        with self._notes:
            self.evictions += edit.evictions
        self._look_for_dead_readers()

    @contextlib.contextmanager
    def raw_writing(self) -> Iterator[Any]:
        """The same without records or notes: what else is to be true, whoever writes sees to."""
        if not self.opened.writable:
            raise StoreError(f"{self.folder}: cannot be written; give its folder rights, or name another")
        with self._writer, self.opened.env.begin(write=True, buffers=True) as txn:
            yield txn

    def take_notes(self) -> tuple[Iterable[ContentKey], Iterable[ContentKey]]:
        """Uses, and finds of damage, that nobody has written yet; whoever takes them does."""
        with self._notes:
            touches, bad = self._touches, self._bad
            self._touches, self._bad = {}, set()
        return touches, bad

    def _look_for_dead_readers(self) -> None:
        """Where the file grew: a process that was killed while it read would keep pages from being used again."""
        last_page = self.opened.env.info()["last_pgno"]
        if last_page > self._last_page:
            self._last_page = last_page
            self.opened.env.reader_check()

    def old_readers(self, least: int) -> set[str]:
        """Processes that read the file as it was before transaction `least`, so that its pages stay in place."""
        self.opened.env.reader_check()
        readers = [line.split() for line in self.opened.env.readers().splitlines()[1:]]
        return {each[0] for each in readers if len(each) == 3 and each[2].isdigit() and int(each[2]) < least}

    def flush(self) -> None:
        """Writes the uses and finds that wait, where that can be done."""
        if self.opened.writable and (self._touches or self._bad):
            with contextlib.suppress(StoreError), self.telling(), self.writing():
                pass

    def entry(self, txn: Any, key: ContentKey) -> Entry | None:
        """None: not there, damaged, or its owner could not find it to erase it."""
        record = txn.get(key, db=self.opened.dbs.entries)
        if record is None:
            return None
        entry = read_entry(key, bytes(record))
        if entry is None or (entry.owner != NOBODY and txn.get(entry.owner + key, db=self.opened.dbs.owners) is None):
            self.found_bad(key)
            return None
        return entry

    def block(self, txn: Any, key: ContentKey, entry: Entry) -> memoryview | None:
        """The bytes that the record vouches for; whether they are whole is for their reader to check."""
        data: memoryview | None = txn.get(key, db=self.opened.dbs.blocks)
        if data is not None and len(data) == max(entry.num_bytes, self.opened.least_bytes):
            data = data[: entry.num_bytes]
            if mark(data) == entry.mark:
                return data
        self.found_bad(key)
        return None

    def state(self, txn: Any) -> State:
        state = read_state(txn.get(b"state", db=self.opened.dbs.facts))
        if state is None:
            raise StoreError(f"{self.folder}: the store's totals are damaged; repair it: rcllm cache verify --repair")
        return state

    def found_bad(self, key: ContentKey) -> None:
        with self._notes:
            if key not in self._bad:
                self._bad.add(key)
                self.errors += 1

    def note_uses(self, keys: Iterable[ContentKey]) -> None:
        with self._notes:
            for key in keys:
                self._touches.pop(key, None)
                self._touches[key] = None
            while len(self._touches) > _MAX_TOUCHES:
                del self._touches[next(iter(self._touches))]

    def drop(self, num_blocks: int) -> None:
        with self._notes:
            self.dropped += num_blocks
