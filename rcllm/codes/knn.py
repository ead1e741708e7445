"""Item-kNN beside a decoder of semantic IDs: what both say of an item becomes one probability.

A decoder learns which kinds of items follow one another, item-kNN knows which items were chosen together, and each
finds what the other misses. Knows nothing of models or files. Invariant: `mixed` orders by a mixture of two
distributions over the items that may come; with share 0 it is the decoder's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import ItemId

_MOST_EVENTS = 50  # of a history that are read


@dataclass(frozen=True)
class Knn:
    """Which items were chosen together, as a distribution over what comes next."""

    item_ids: tuple[ItemId, ...]  # those that were learnt from, by their numbers here
    likeness: Any  # sparse [items, items]: of each item to those most alike, and none to itself
    share: float  # of the mixture, where a request does not say

    @cached_property
    def _numbers(self) -> Mapping[ItemId, int]:
        return {item_id: number for number, item_id in enumerate(self.item_ids)}

    def shares(
        self, history: Sequence[ItemId], code_index: CodeIndex, allowed: Allowed | None, most: int
    ) -> dict[ItemId, float]:
        """The `most` likeliest of the items that may come, best first; empty where the history says nothing.

        Each has its share of the summed likeness to the history, of all items that may come. The last event counts in
        full, the one before it half, the k-th from the end 1 / k. `allowed`: as in a search.
        """
        last = enumerate(reversed(history[-_MOST_EVENTS:]), 1)
        read = [(self._numbers[item_id], 1.0 / place) for place, item_id in last if item_id in self._numbers]
        near = self.likeness[[number for number, _ in read]] if read else self.likeness[:0]
        weights = np.repeat([weight for _, weight in read], np.diff(near.indptr))
        numbers, places = np.unique(near.indices, return_inverse=True)
        sums = np.bincount(places, near.data * weights, len(numbers))
        ids = [self.item_ids[number] for number in numbers.tolist()]
        live = [
            at
            for at, number in enumerate(code_index.item_ids.find(ids))
            if number is not None and (allowed is None or allowed.items[number])
        ]
        sums = sums[live] / max(sums[live].sum(), np.finfo(np.float64).tiny)
        best = np.argsort(-sums, kind="stable")[:most].tolist()
        return {ids[live[at]]: float(sums[at]) for at in best}


def mixed(
    found: Mapping[ItemId, float], shares: Mapping[ItemId, float], share: float, n: int
) -> tuple[tuple[ItemId, ...], tuple[float, ...]]:
    """The best `n` items of both, and log((1 - share) · p + share · s); of equal ones the decoder's come first.

    `found`: log p of the items that a search found. `shares`: s, as `Knn.shares` gives them. An item that one of them
    lacks has nothing from it. `share` is above 0, and below 1, so that every item that was found keeps a probability.
    """
    scores = {item_id: math.log1p(-share) + score for item_id, score in found.items()}
    for item_id, each in shares.items():
        theirs = math.log(share) + math.log(each)  # for the product may be too small for a number
        scores[item_id] = float(np.logaddexp(scores[item_id], theirs)) if item_id in scores else theirs
    best = sorted(scores, key=lambda item_id: -scores[item_id])[:n]
    return tuple(best), tuple(scores[item_id] for item_id in best)
