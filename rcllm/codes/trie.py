"""The trie of valid code sequences, as flat arrays in CSR form, built and walked without loops over nodes.

Knows nothing of items' names or of who may see them. Invariant: nodes of a level stand in the order of their code
sequences. Every node but the root of an empty trie leads to at least one item. The items below a node are one run of
the items in the order of their codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import BoolArray, IntArray

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Children:
    """Valid extensions of some nodes, in CSR form: those of row i are first[i] to first[i + 1]."""

    first: Places  # [rows + 1]
    parents: Places  # [children], which row; never falls
    nodes: IntArray  # [children], of the next level
    codes: IntArray  # [children], rising within a row
    num_dead: int  # children that were left out, since no allowed item is below them


@dataclass(frozen=True, slots=True)
class Located:
    """Where code sequences are in a trie, or would be."""

    found: BoolArray  # [sequences]
    leaves: Places  # [sequences]; of those that are found, the leaf
    places: Places  # [sequences], how many items come before or share the sequence, in the order of codes


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """Level 0 is the root, level `num_levels` the leaves.

    Children of node i of level l are the nodes first[l][i] to first[l][i + 1] of level l + 1, by rising code.
    """

    first: tuple[IntArray, ...]  # per level but the last: [nodes of l + 1]
    code: tuple[IntArray, ...]  # per level but the last: [nodes of level l + 1], the code that leads to each
    span: tuple[IntArray, ...]  # per level: [nodes of l + 1]; below node i are the places span[i] to span[i + 1]
    sizes: tuple[int, ...]  # codes of each level

    @classmethod
    def of_sorted(cls, codes: IntArray, sizes: tuple[int, ...]) -> Trie:
        """codes [items, levels], in lexicographic order."""
        num_items, num_levels = codes.shape
        begins = np.zeros(num_items, np.bool_)  # whether another node of the level begins at this place
        begins[:1] = True
        spans = [_closed(np.zeros(1, np.int64), num_items)]
        first: list[IntArray] = []
        code: list[IntArray] = []
        for level in range(num_levels):
            column, above = codes[:, level], begins.copy()
            begins[1:] |= column[1:] != column[:-1]
            below = np.flatnonzero(begins)
            # an empty trie has a root all the same, without children
            starts = np.flatnonzero(above[below]) if level else np.zeros(1, np.int64)
            first.append(_closed(starts, len(below)))
            code.append(np.ascontiguousarray(column[below], dtype=np.int32))
            spans.append(_closed(below, num_items))
        return cls(tuple(first), tuple(code), tuple(spans), sizes)

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_nodes(self) -> tuple[int, ...]:
        """Per level, from the root's 1 to the number of leaves."""
        return tuple(len(span) - 1 for span in self.span)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.first, *self.code, *self.span))

    def children(self, level: int, nodes: IntArray, alive: BoolArray | None = None) -> Children:
        """Children of `nodes` [rows] of `level`; `alive` [nodes of level + 1]: which may come, None: all."""
        first = self.first[level]
        starts = first[nodes].astype(np.int64)
        counts = first[nodes + 1] - starts
        ends = np.cumsum(counts)
        num_all = int(ends[-1]) if len(ends) else 0
        parents = np.repeat(np.arange(len(nodes)), counts)
        below = np.arange(num_all) + np.repeat(starts - (ends - counts), counts)
        if alive is not None:
            kept = alive[below]
            parents, below = parents[kept], below[kept]
            ends = np.cumsum(np.bincount(parents, minlength=len(nodes)))
        first_of_row = np.concatenate([np.zeros(1, np.int64), ends])
        return Children(first_of_row, parents, below.astype(np.int32), self.code[level][below], num_all - len(below))

    def above(self, level: int, places: Places | IntArray) -> Places:
        """The nodes of `level` above these places."""
        return np.searchsorted(self.span[level], places, side="right") - 1

    def locate(self, codes: IntArray) -> Located:
        """Looks up `codes` [sequences, levels], each code below its level's size, all of them at once."""
        count = len(codes)
        found, leaves, places = np.zeros(count, np.bool_), np.zeros(count, np.int64), np.zeros(count, np.int64)
        rows, nodes = np.arange(count), np.zeros(count, np.int64)  # sequences that are still on the trie, and where
        for level in range(self.num_levels):
            index, there = self._child(level, nodes, codes[rows, level])
            places[rows[~there]] = self.span[level + 1][index[~there]]
            rows, nodes = rows[there], index[there]
        found[rows], leaves[rows], places[rows] = True, nodes, self.span[-1][nodes + 1]
        return Located(found, leaves, places)

    def _child(self, level: int, nodes: Places, codes: IntArray) -> tuple[Places, BoolArray]:
        """Of each node, the first child whose code is not smaller (or where it would be), and whether it is equal."""
        first, code = self.first[level], self.code[level]
        low, end = first[nodes].astype(np.int64), first[nodes + 1].astype(np.int64)
        if not len(code):
            return low, np.zeros(len(nodes), np.bool_)
        high = end
        for _ in range(self.sizes[level].bit_length()):  # bisects all rows at once
            middle = (low + high) // 2
            smaller = (low < high) & (code[np.minimum(middle, len(code) - 1)] < codes)
            high = np.where((low < high) & ~smaller, middle, high)
            low = np.where(smaller, middle + 1, low)
        return low, (low < end) & (code[np.minimum(low, len(code) - 1)] == codes)


def _closed(starts: Places, end: int) -> IntArray:
    return np.concatenate([starts, [end]]).astype(np.int32)
