"""Top-beam the slow ways: a full stable sort, and a k-way merge of sorted children with a heap, one step at a time.

Also the in-place reorder of xGR, one row after another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def full_sort(parent_scores: Floats, first: Ints, child_scores: Floats, beam: int) -> Ints:
    """Flat indices of the best, rising."""
    scores = child_scores + np.repeat(parent_scores, np.diff(first))
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return np.array(sorted(order[:beam]), np.int64)


def heap_merge(parent_scores: Floats, first: Ints, child_scores: Floats, beam: int) -> tuple[Ints, int]:
    """The same by early termination: children of each row sorted, heads in a heap; also how many were popped."""
    rows: list[list[tuple[np.float32, int]]] = []
    for row, parent in enumerate(parent_scores):
        indices = range(int(first[row]), int(first[row + 1]))
        rows.append(sorted((-(child_scores[index] + parent), index) for index in indices))
    heads = [(*children[0], row, 0) for row, children in enumerate(rows) if children]
    heapq.heapify(heads)
    chosen: list[int] = []
    while heads and len(chosen) < beam:
        _, index, row, rank = heapq.heappop(heads)
        chosen.append(index)
        if rank + 1 < len(rows[row]):
            heapq.heappush(heads, (*rows[row][rank + 1], row, rank + 1))
    return np.array(sorted(chosen), np.int64), len(chosen)


def reorder_one_by_one(buffer: Any, parents: Sequence[int]) -> None:
    """xGR's cache_select: right only where `parents` never fall."""
    for new in range(len(parents)):
        if parents[new] > new:
            buffer[new] = buffer[parents[new]]
    for new in reversed(range(len(parents))):
        if parents[new] < new:
            buffer[new] = buffer[parents[new]]
