"""What one request may be answered with: bitmaps of items, and of the trie's nodes that lead to any of them.

Knows nothing of item ids, nor why an item is barred. Invariant: a node is alive exactly where an allowed item is below
it. Arrays are shared between filters and never written to after they were made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcllm.codes.trie import Places, Trie
from rcllm.core.ranking import BoolArray, IntArray


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Allowed:
    """A filter for one epoch of a catalogue."""

    items: BoolArray  # [items], by item number
    nodes: tuple[BoolArray, ...]  # per level of the trie: [nodes]

    @property
    def num_items(self) -> int:
        return int(np.count_nonzero(self.items))


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """Items in the order of their codes, above them a trie, and which of them are on offer.

    Filters that are made of it cost little where few items are named: only their paths to the root are looked at.
    """

    trie: Trie
    order: IntArray  # [items], the item at each place
    place: IntArray  # [items], the place of each item
    offered: Allowed | None  # None: all
    before: IntArray | None  # [items + 1], items on offer at smaller places; None: all are

    @classmethod
    def full(cls, trie: Trie, order: IntArray) -> Shelf:
        place = np.empty_like(order)
        place[order] = np.arange(len(order), dtype=np.int32)
        return cls(trie, order, place, None, None)

    def offering(self, items: BoolArray) -> Shelf:
        """The same items, of which `items` [items] are on offer. Looks at all of them."""
        if items.all():
            return Shelf(self.trie, self.order, self.place, None, None)
        before = self._before(items)
        return Shelf(self.trie, self.order, self.place, self._filter(items, before), before)

    def only(self, numbers: Places) -> Allowed:
        """The items of these `numbers` that are on offer."""
        if self.offered is not None:
            numbers = numbers[self.offered.items[numbers]]
        items = np.zeros(len(self.order), np.bool_)
        items[numbers] = True
        nodes = [np.zeros(count, np.bool_) for count in self.trie.num_nodes]
        for level, alive in enumerate(nodes):
            alive[self.trie.above(level, self.place[numbers])] = True
        return Allowed(items, tuple(nodes))

    def without(self, numbers: Places) -> Allowed | None:
        """What is on offer but for the items of these `numbers`; None: all items."""
        numbers = np.unique(numbers if self.offered is None else numbers[self.offered.items[numbers]])
        if not len(numbers):
            return self.offered
        items = np.ones(len(self.order), np.bool_) if self.offered is None else self.offered.items.copy()
        items[numbers] = False
        nodes = [self._without(level, self.place[numbers]) for level in range(self.trie.num_levels + 1)]
        return Allowed(items, tuple(nodes))

    def _without(self, level: int, places: IntArray) -> BoolArray:
        above, lost = np.unique(self.trie.above(level, places), return_counts=True)
        span = self.trie.span[level]
        start, stop = span[above], span[above + 1]
        left = stop - start if self.before is None else self.before[stop] - self.before[start]
        dead = above[left == lost]
        if self.offered is None:
            alive = np.ones(len(span) - 1, np.bool_)
        elif not len(dead):
            return self.offered.nodes[level]
        else:
            alive = self.offered.nodes[level].copy()
        alive[dead] = False
        return alive

    def _before(self, items: BoolArray) -> IntArray:
        before = np.zeros(len(items) + 1, np.int32)
        np.cumsum(items[self.order], out=before[1:])
        return before

    def _filter(self, items: BoolArray, before: IntArray) -> Allowed:
        return Allowed(items, tuple(before[span[1:]] > before[span[:-1]] for span in self.trie.span))
