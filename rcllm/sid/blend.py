"""How much a decoder's recommendations take from item-kNN: what is best on validation users.

Knows nothing of training or files. Invariant: item-kNN is made of training users alone, and the order that is measured
is the one that `rcllm recommend` would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from scipy import sparse

from rcllm.codes.index import CodeIndex
from rcllm.codes.knn import Knn, mixed
from rcllm.core.enrichment import NeighbourConfig
from rcllm.core.ranking import ItemId
from rcllm.data.item_knn import ItemKnn
from rcllm.drafts.lightgcn import interaction_matrix
from rcllm.sid.held_out import TOP, Histories, gain

NEAREST = 100  # of an item, that are kept
SHARES = tuple(round(0.1 * step, 1) for step in range(10))


@dataclass(frozen=True, slots=True)
class Searched:
    """What the decoder alone found for one held-out user."""

    history: tuple[ItemId, ...]
    target: ItemId
    found: Mapping[ItemId, float]  # log-probability of the best items, best first


def nearest(train: Histories, item_ids: Sequence[ItemId]) -> Knn:
    """Item-kNN of these histories of item numbers, with no share yet."""
    knn = ItemKnn.of(interaction_matrix(train, len(item_ids)), NeighbourConfig().shrinkage)
    rows = [knn.neighbours(item, NEAREST) for item in range(len(item_ids))]
    near = np.array([item for row in rows for item, _ in row], np.int32)
    values = np.array([likeness for row in rows for _, likeness in row], np.float32)
    starts = list(accumulate(map(len, rows), initial=0))
    likeness = sparse.csr_array((values, near, starts), shape=(len(rows), len(rows)))
    return Knn(tuple(item_ids), likeness, share=0.0)


def blended(knn: Knn, code_index: CodeIndex, validation: Sequence[Searched]) -> Knn:
    """`knn` with the share that gives the highest NDCG@10; of equal ones the smallest."""
    said = [
        knn.shares(each.history, code_index, code_index.allowed(deny=each.history), len(each.found))
        for each in validation
    ]

    def ndcg(share: float) -> float:
        gains = [_gain(each, shares, share) for each, shares in zip(validation, said, strict=True)]
        return round(float(np.mean(gains)), 9) if gains else 0.0

    return replace(knn, share=max(SHARES, key=ndcg))  # the first of equal ones


def _gain(searched: Searched, shares: Mapping[ItemId, float], share: float) -> float:
    items = mixed(searched.found, shares, share, TOP)[0] if share else tuple(searched.found)
    return gain(items, searched.target)
