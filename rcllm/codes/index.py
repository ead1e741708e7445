"""The catalogue of semantic IDs: items, the codes that each is known by, and the trie of valid code sequences.

Knows nothing of models, prompts or files. Invariant: a `CodeIndex` never changes (it is one epoch); the next one is
derived from it by merging sorted arrays, beside the requests that read it and without waiting for them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.codes.allowed import Allowed, Shelf
from rcllm.codes.gather import gathered
from rcllm.codes.item_ids import ItemIds
from rcllm.codes.trie import Places, Trie
from rcllm.codes.updates import Update, merged
from rcllm.core.ranking import BoolArray, IntArray, ItemId
from rcllm.errors import DataError, RcllmError, UnknownItemError

MIN_LEVELS, MAX_LEVELS = 2, 6
_WORKER_NICE = 19  # requests that run come first: a forward pass waits for the slowest of its threads


@dataclass(frozen=True, slots=True)
class CodeTokens:
    """Token ids of codes: code c of level l is token ids[l][c] of the model's vocabulary."""

    ids: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class CodeStats:
    """How a catalogue's semantic IDs are used."""

    epoch: int
    num_items: int
    num_disabled: int
    num_leaves: int  # code sequences that are in use
    num_collided: int  # items that share theirs with another
    max_items_per_leaf: int
    nodes_per_level: tuple[int, ...]  # from the root to the leaves
    num_bytes: int  # of all arrays; item ids and their strings not counted


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CodeIndex:
    """Items with their semantic IDs, of which several may be the same. One epoch: it never changes."""

    item_ids: ItemIds  # by item number
    codes: IntArray  # [items, levels]
    sizes: tuple[int, ...]  # codes of each level
    epoch: int  # rises with every change
    shelf: Shelf

    @classmethod
    def build(cls, codes: IntArray, item_ids: Sequence[ItemId], sizes: Sequence[int], epoch: int = 0) -> CodeIndex:
        """`codes` [items, levels], of 2 to 6 levels with `sizes` codes each. Raises DataError."""
        sizes = tuple(int(size) for size in sizes)
        codes = check_codes(codes, item_ids, sizes)
        ids = ItemIds.of(item_ids)
        if (twice := ids.twice()) is not None:
            raise DataError(f"expected each item once, got item {twice!r} twice; remove one of them")
        order = np.lexsort(codes.T[::-1]).astype(np.int32)
        shelf = Shelf.full(Trie.of_sorted(codes[order], sizes), order)
        return cls(ids, codes, sizes, epoch, shelf)

    @property
    def trie(self) -> Trie:
        return self.shelf.trie

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        return len(self.sizes)

    @property
    def enabled(self) -> BoolArray:
        """Which items are on offer, [items]."""
        offered = self.shelf.offered
        return np.ones(self.num_items, np.bool_) if offered is None else offered.items

    def number_of(self, item_id: ItemId) -> int | None:
        return self.item_ids.find([item_id])[0]

    def numbers_of(self, item_ids: Sequence[ItemId]) -> Places:
        """Of those items that the catalogue has."""
        return np.array([number for number in self.item_ids.find(item_ids) if number is not None], np.int64)

    def items_of(self, leaf: int) -> IntArray:
        """Numbers of the items below a leaf, on offer or not, by rising number."""
        span = self.trie.span[-1]
        return self.shelf.order[span[leaf] : span[leaf + 1]]

    def allowed(self, allow: Sequence[ItemId] | None = None, deny: Sequence[ItemId] = ()) -> Allowed | None:
        """What a request may be answered with; None: all items.

        Enabled items that are in `allow` (None: all) and not in `deny`. Ids that this epoch lacks are passed over:
        items come and go. Costs little where few items are named.
        """
        denied = self.numbers_of(deny)
        if allow is None:
            return self.shelf.without(denied)
        return self.shelf.only(np.setdiff1d(self.numbers_of(allow), denied))

    def changed(self, update: Update) -> CodeIndex:
        """The next epoch. What it removes, enables or disables and this one does not have is passed over.

        Items keep their order, added ones come last. Raises DataError for wrong codes and ids that are there already.
        """
        removed = self.numbers_of(list(update.remove))
        base = self._with_items(removed, update.add) if len(removed) or update.add else self
        shelf = base.shelf
        if update.enabled:
            enabled = base.enabled.copy()
            for on in (True, False):
                enabled[base.numbers_of([item_id for item_id, value in update.enabled.items() if value is on])] = on
            shelf = shelf.offering(enabled)
        return CodeIndex(base.item_ids, base.codes, base.sizes, self.epoch + 1, shelf)

    def _with_items(self, removed: Places, add: Mapping[ItemId, Sequence[int]]) -> CodeIndex:
        keep = np.ones(self.num_items, np.bool_)
        keep[removed] = False
        moved = np.cumsum(keep, dtype=np.int32) - np.int32(1)  # new number of each item that stays
        added = tuple(add)
        codes_added = self._checked(add)
        codes = np.concatenate([self.codes[keep], codes_added])
        kept_places = gathered(keep, self.shelf.order)
        order = gathered(moved, self.shelf.order[kept_places])
        # places among the old items, less those that leave before them
        gone = np.concatenate([[0], np.cumsum(~kept_places)])
        sorted_added = np.lexsort(codes_added.T[::-1])
        places = self.trie.locate(codes_added[sorted_added]).places
        order = np.insert(order, places - gone[places], sorted_added + len(order)).astype(np.int32)
        item_ids = self.item_ids.changed(keep, added)
        if (twice := item_ids.twice()) is not None:
            raise DataError(f"expected a new item, got {twice!r} again; remove it first to change its codes")
        shelf = Shelf.full(Trie.of_sorted(gathered(codes, order), self.sizes), order)
        if self.shelf.offered is not None:
            shelf = shelf.offering(np.concatenate([self.enabled[keep], np.ones(len(added), np.bool_)]))
        return CodeIndex(item_ids, codes, self.sizes, self.epoch, shelf)

    def _checked(self, add: Mapping[ItemId, Sequence[int]]) -> IntArray:
        """The codes of these items; [items, levels]."""
        for item_id, codes in add.items():
            if len(codes) != self.num_levels:
                raise DataError(f"item {item_id!r}: expected {self.num_levels} codes, got {len(codes)}: {tuple(codes)}")
        rows = np.array(list(add.values())) if add else np.zeros((0, self.num_levels), np.int32)
        return check_codes(rows, tuple(add), self.sizes)

    def stats(self) -> CodeStats:
        per_leaf = np.diff(self.trie.span[-1])
        shelf = self.shelf
        arrays: list[npt.NDArray[Any]] = [self.codes, shelf.order, shelf.place]
        if shelf.offered is not None and shelf.before is not None:
            arrays += [shelf.before, shelf.offered.items, *shelf.offered.nodes]
        return CodeStats(
            self.epoch,
            self.num_items,
            int(np.count_nonzero(~self.enabled)),
            len(per_leaf),
            int(per_leaf[per_leaf > 1].sum()),
            int(per_leaf.max(initial=0)),
            self.trie.num_nodes,
            sum(array.nbytes for array in arrays) + self.trie.num_bytes + self.item_ids.num_bytes,
        )


def check_codes(codes: npt.NDArray[Any], item_ids: Sequence[ItemId], sizes: tuple[int, ...]) -> IntArray:
    """`codes` as int32 [items, levels]; raises DataError that names the item and level of a wrong one."""
    if not MIN_LEVELS <= len(sizes) <= MAX_LEVELS or min(sizes) < 1:
        raise DataError(f"expected {MIN_LEVELS} to {MAX_LEVELS} levels of at least one code each, got sizes {sizes}")
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer):
        raise DataError(
            f"expected whole numbers [items, {len(sizes)}], a code for each level, got {codes.dtype} of shape "
            f"{codes.shape}; give each item {len(sizes)} codes"
        )
    if len(codes) != len(item_ids):
        raise DataError(f"expected codes for each of {len(item_ids):,} items, got {len(codes):,} rows")
    wrong = (codes < 0) | (codes >= np.array(sizes))
    if wrong.any():
        item, level = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"item {item_ids[item]!r}: expected a code from 0 to {sizes[level] - 1} at level {level}, got "
            f"{codes[item, level]}; correct it, or raise that level's size"
        )
    return np.array(codes, dtype=np.int32, order="C")  # a copy, which nobody else can write to


class LiveCodes:
    """The current epoch, and changes to it while requests run. Safe to call from several threads.

    A change returns when it is accepted, in the order of the calls. A thread that lives while there is work makes the
    next epoch of all changes that wait. Requests keep the epoch that they took.
    """

    def __init__(self, code_index: CodeIndex, rest: float = 2.0) -> None:
        """`rest`: after an epoch that took t seconds to make, the next is begun after rest · t seconds.

        So a stream of changes to a large catalogue leaves the processor to requests. Where `flush` waits, it begins at
        once.
        """
        self._code_index = code_index
        self._rest = rest
        self._num_flushing = 0
        self._waiting: list[Update] = []
        self._known: dict[ItemId, bool] = {}  # of the items that changes on their way add (True) or remove (False)
        self._num_accepted = self._num_applied = 0
        self._working = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()  # guards everything; readers of the epoch do not need it

    def epoch(self) -> CodeIndex:
        """The current epoch of the index. Never waits for changes that are on their way."""
        return self._code_index

    def add(self, items: Mapping[ItemId, Sequence[int]]) -> None:
        """New items, by id, with their codes. Raises DataError for wrong codes and ids that are there already."""
        self.apply(Update(add={item_id: tuple(codes) for item_id, codes in items.items()}))

    def remove(self, item_ids: Iterable[ItemId]) -> None:
        """Raises UnknownItemError."""
        self.apply(Update(remove=frozenset(item_ids)))

    def disable(self, item_ids: Iterable[ItemId]) -> None:
        """Items stay, and are not recommended until they are enabled. Raises UnknownItemError."""
        self.apply(Update(enabled=dict.fromkeys(item_ids, False)))

    def enable(self, item_ids: Iterable[ItemId]) -> None:
        """Raises UnknownItemError."""
        self.apply(Update(enabled=dict.fromkeys(item_ids, True)))

    def apply(self, update: Update) -> None:
        """All of it in one epoch, or nothing: raises DataError, UnknownItemError before anything is changed."""
        with self._changed:
            self._check(update)
            self._known |= dict.fromkeys(update.remove, False) | dict.fromkeys(update.add, True)
            self._waiting.append(update)
            self._num_accepted += 1
            if not self._working:
                self._working, self._failure = True, None
                threading.Thread(target=self._work, name="rcllm-catalogue", daemon=True).start()

    def check(self, update: Update) -> None:
        """Raises what `apply` would raise; changes nothing."""
        with self._changed:
            self._check(update)

    def flush(self) -> CodeIndex:
        """Waits for all changes accepted so far; the epoch that has them. Raises RcllmError if they cannot be made."""
        with self._changed:
            wanted = self._num_accepted
            self._num_flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_applied >= wanted or self._failure is not None)
            self._num_flushing -= 1
            if self._failure is not None:
                raise RcllmError(
                    f"{len(self._waiting)} changes of the catalogue could not be made ({self._failure!r}); they are "
                    "kept and tried again with the next change"
                ) from self._failure
            return self._code_index

    def _check(self, update: Update) -> None:
        self._code_index._checked(update.add)
        there = self._among([*update.remove, *update.add, *update.enabled])
        if unknown := update.remove - there:
            raise UnknownItemError(f"the catalogue has no item {min(unknown)!r} to remove; nothing was changed")
        left = there - update.remove
        if again := update.add.keys() & left:
            raise DataError(
                f"expected a new item, got {min(again)!r} again; remove it in the same update to replace it"
            )
        if lost := update.enabled.keys() - left - update.add.keys():
            raise UnknownItemError(f"the catalogue has no item {min(lost)!r} to enable or disable; nothing was changed")

    def _among(self, item_ids: Sequence[ItemId]) -> set[ItemId]:
        """Those that the catalogue has once all changes on their way are made."""
        others = [item_id for item_id in item_ids if item_id not in self._known]
        found = zip(others, self._code_index.item_ids.find(others), strict=True)
        there = {item_id for item_id, number in found if number is not None}
        return there | {item_id for item_id in item_ids if self._known.get(item_id)}

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # where threads have priorities of their own (Linux)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WORKER_NICE)
        while True:
            with self._changed:
                taken, self._waiting = self._waiting, []
                if not taken:
                    self._working = False
                    self._known.clear()  # the epoch has it all
                    return
            start = time.monotonic()
            try:
                code_index = self._code_index.changed(merged(taken))
            except Exception as error:  # out of memory, for example: told to whoever waits, and tried again later
                with self._changed:
                    self._waiting[:0] = taken
                    self._working, self._failure = False, error
                    self._changed.notify_all()
                return
            with self._changed:
                self._code_index = code_index
                self._num_applied += len(taken)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._num_flushing > 0, (time.monotonic() - start) * self._rest)
