"""Item ids by item number, and item numbers by id, for catalogues of millions of items that change all the time.

Knows nothing of what items are. Invariant: instances never change. The next one is merged from arrays of numbers and
shares the strings: copying or hashing a million Python objects would hold up every thread of the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from threading import Lock
from typing import overload

import numpy as np

from rcllm.codes.gather import gathered
from rcllm.codes.trie import Places
from rcllm.core.ranking import BoolArray, IntArray, ItemId


class _Names:
    """Strings that are only ever added to, shared by all epochs that came from one."""

    def __init__(self, names: list[ItemId]) -> None:
        self.all = names
        self._lock = Lock()

    def append(self, added: Sequence[ItemId]) -> int:
        """Where the first of them is."""
        with self._lock:
            start = len(self.all)
            self.all.extend(added)
            return start


class ItemIds(Sequence[ItemId]):
    """The ids in the order of item numbers. Looked up by sorted hashes."""

    def __init__(self, names: _Names, slots: IntArray, hashes: Places, numbers: IntArray) -> None:
        self._names = names
        self._slots = slots  # [items], where the name is
        self._hashes, self._numbers = hashes, numbers  # [items], by rising hash

    @classmethod
    def of(cls, item_ids: Sequence[ItemId]) -> ItemIds:
        hashes = _hashes(item_ids)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        return cls(_Names(list(item_ids)), np.arange(len(item_ids), dtype=np.int32), hashes[order], order)

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, number: int) -> ItemId: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ItemId]: ...
    def __getitem__(self, number: int | slice) -> ItemId | Sequence[ItemId]:
        if isinstance(number, slice):
            return [self._names.all[slot] for slot in self._slots[number].tolist()]
        return self._names.all[int(self._slots[number])]

    def __iter__(self) -> Iterator[ItemId]:
        return map(self._names.all.__getitem__, self._slots.tolist())

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and self.find([ItemId(item_id)])[0] is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __repr__(self) -> str:
        return f"ItemIds({len(self):,} items)"

    @property
    def num_bytes(self) -> int:
        """How many bytes the arrays take; the strings are shared and not counted."""
        return self._slots.nbytes + self._hashes.nbytes + self._numbers.nbytes

    def find(self, wanted: Sequence[ItemId]) -> list[int | None]:
        """The number of each of `wanted`, None where there is none."""
        hashes = _hashes(wanted)
        first, last = np.searchsorted(self._hashes, hashes), np.searchsorted(self._hashes, hashes, side="right")
        return [
            next((number for number in self._numbers[start:stop].tolist() if self[number] == item_id), None)
            for item_id, start, stop in zip(wanted, first.tolist(), last.tolist(), strict=True)
        ]

    def twice(self) -> ItemId | None:
        """An id that stands for two items, if there is one."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for hashed in np.unique(self._hashes[same]):
            run = slice(np.searchsorted(self._hashes, hashed), np.searchsorted(self._hashes, hashed, side="right"))
            numbers: list[int] = self._numbers[run].tolist()
            for name, other in pairwise(sorted(self[number] for number in numbers)):
                if name == other:
                    return name
        return None

    def changed(self, keep: BoolArray, added: Sequence[ItemId]) -> ItemIds:
        """Those that `keep` [items] says, in their order, then `added`."""
        moved = np.cumsum(keep, dtype=np.int32) - np.int32(1)
        kept = gathered(keep, self._numbers)
        hashes, numbers = self._hashes[kept], gathered(moved, self._numbers[kept])
        names, slots = self._names, self._slots[keep]
        if len(names.all) > 2 * (len(slots) + len(added)):  # mostly names of items that are gone
            names, slots = _Names([names.all[slot] for slot in slots.tolist()]), np.arange(len(slots), dtype=np.int32)
        start = names.append(added)
        new_hashes = _hashes(added)
        order = np.argsort(new_hashes, kind="stable")
        at = np.searchsorted(hashes, new_hashes[order])
        return ItemIds(
            names,
            np.concatenate([slots, np.arange(start, start + len(added), dtype=np.int32)]),
            np.insert(hashes, at, new_hashes[order]),
            np.insert(numbers, at, (order + len(slots)).astype(np.int32)),
        )


def _hashes(item_ids: Sequence[ItemId]) -> Places:
    return np.fromiter(map(hash, item_ids), np.int64, len(item_ids))
