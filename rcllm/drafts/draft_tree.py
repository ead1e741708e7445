"""Many guessed continuations merged into one tree, ranked by the estimated probability that a node is accepted.

Knows nothing of where continuations come from. Invariant: the same rows give the same tree, in whatever order they
come; a node's weight is the product of smoothed conditional frequencies along its path (REST, NAACL'24; PIA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import IntArray
from rcllm.drafts.draft import EMPTY, DraftTree

END = -1  # pads a continuation that ends early


@dataclass(frozen=True, slots=True)
class Continuations:
    """What followed, wherever the text so far was found again."""

    windows: IntArray  # [rows, branch] token ids, END after the last
    evidence: npt.NDArray[np.float64]  # [rows] > 0: how much each row counts

    def __len__(self) -> int:
        return len(self.windows)


def windows(text: IntArray, places: npt.NDArray[np.integer[Any]], branch: int) -> IntArray:
    """[places, branch]: what stands in `text` from each place on, END from its first END, or its end, on."""
    at = places[:, None] + np.arange(branch)
    found: IntArray = text[np.minimum(at, len(text) - 1)]
    found[~np.logical_and.accumulate((found != END) & (at < len(text)), axis=1)] = END
    return found


def joined(parts: list[Continuations]) -> Continuations:
    """All rows of `parts`, which have one branch length."""
    if len(parts) == 1:
        return parts[0]
    return Continuations(
        np.concatenate([part.windows for part in parts]), np.concatenate([part.evidence for part in parts])
    )


def merge(rows: Continuations, max_nodes: int, doubt: float) -> DraftTree:
    """The `max_nodes` nodes of greatest weight of the trie of all rows; ties by depth, then by token ids.

    p(child | parent) = evidence of the child / (evidence of the parent + doubt).
    """
    if not len(rows) or max_nodes < 1:
        return EMPTY
    order = np.lexsort(rows.windows.T[::-1])
    windows, evidence = rows.windows[order], rows.evidence[order]
    alive = np.logical_and.accumulate(windows != END, axis=1)
    begins = np.ones(windows.shape, bool)  # the row is the first one of its node
    begins[1:] = np.logical_or.accumulate(windows[1:] != windows[:-1], axis=1)
    begins &= alive
    node_of = np.cumsum(begins.T.ravel()).reshape(begins.T.shape)  # [branch, rows]; numbered from 1, depth by depth
    depths, firsts = np.nonzero(begins.T)  # [nodes]
    parents = np.where(depths > 0, node_of[depths - 1, firsts], 0)
    mass = np.bincount(node_of[alive.T], np.broadcast_to(evidence, alive.T.shape)[alive.T], len(depths) + 1)
    mass[0] = evidence.sum()
    share = mass[1:] / (mass[parents] + doubt)
    weights = np.ones(len(depths) + 1)
    bounds = np.searchsorted(depths, np.arange(windows.shape[1] + 1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        weights[start + 1 : stop + 1] = weights[parents[start:stop]] * share[start:stop]
    kept = np.argsort(-weights[1:], kind="stable")[:max_nodes]
    number = np.zeros(len(depths) + 1, np.int32)
    number[kept + 1] = np.arange(1, len(kept) + 1, dtype=np.int32)
    return DraftTree(
        windows[firsts[kept], depths[kept]].astype(np.int32),
        number[parents[kept]],
        weights[kept + 1].astype(np.float32),
    )
