"""Disk stores that are open in this process: who names the same folder shares one, which the last of them closes.

LMDB maps a file once for each process, so the list of what is open is the process's own. Knows nothing of blocks.
Invariant: a store is open while somebody holds it, and a fork of the process opens its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.disk.store import DiskStore


@dataclass(slots=True)
class _Open:
    disk: DiskStore
    num_holders: int


_OPEN: dict[tuple[int, Path], _Open] = {}  # by process and folder
_LOCK = threading.Lock()


class SharedDisk:
    """One holder's part in a `DiskStore`. Use `SharedDisk.open`; `close` ends this part alone."""

    def __init__(self, disk: DiskStore, name: tuple[int, Path]) -> None:
        self.disk = disk
        self._name: tuple[int, Path] | None = name

    @classmethod
    def open(cls, folder: Path, budget_bytes: int) -> SharedDisk:
        """The budget that was named last is the store's. Raises StoreError."""
        name = (os.getpid(), folder.resolve())
        with _LOCK:
            if (there := _OPEN.get(name)) is None:
                there = _OPEN[name] = _Open(DiskStore.open(folder, budget_bytes), 0)
            elif there.disk.budget_bytes != budget_bytes:
                there.disk.set_budget(budget_bytes)
            there.num_holders += 1
            return cls(there.disk, name)

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        return self.disk.lookup_many(keys)

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        return self.disk.get_many(keys)

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        self.disk.put_many(blocks)

    def delete_owner(self, owner: str) -> int:
        return self.disk.delete_owner(owner)

    def stats(self) -> Sequence[TierStats]:
        return self.disk.stats()

    def close(self) -> None:
        """Closing it again does nothing."""
        with _LOCK:
            name, self._name = self._name, None
            if name is None or name not in _OPEN:
                return
            _OPEN[name].num_holders -= 1
            if not _OPEN[name].num_holders:
                _OPEN.pop(name).disk.close()
