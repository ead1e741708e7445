"""Draws the candidates that a user did not choose.

Knows nothing of requests. Invariant: a draw depends on the pool, its arguments and the generator alone, uses integers
only (so that it is the same on every machine), and never returns a banned item or one item twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rcllm.core.ranking import ItemId, Negatives

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NegativePool:
    """What negatives are drawn from. Items are numbered in the order of the catalogue."""

    item_ids: tuple[ItemId, ...]
    numbers: Mapping[ItemId, int]
    touched: Any  # sparse, [training users, items]: 1 where the user touched the item
    popularity: IntArray  # [items], the number of training users that touched it

    @classmethod
    def of(cls, catalogue: Iterable[ItemId], training: Iterable[Iterable[ItemId]]) -> NegativePool:
        """`training`: the items of each training user; all of them in the catalogue."""
        item_ids = tuple(catalogue)
        numbers = {item_id: number for number, item_id in enumerate(item_ids)}
        pairs = [
            (row, number)
            for row, items in enumerate(training)
            for number in sorted({numbers[item_id] for item_id in items})
        ]
        at = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        shape = (int(at[-1, 0]) + 1 if len(at) else 0, len(item_ids))
        touched = sparse.csr_array((np.ones(len(at), dtype=np.int64), (at[:, 0], at[:, 1])), shape=shape)
        return cls(item_ids, numbers, touched, np.bincount(at[:, 1], minlength=len(item_ids)).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Wanted:
    """One draw: `count` items that are not in `banned`, for a user with this `history`."""

    count: int
    banned: IntArray  # item numbers
    history: IntArray  # item numbers; may repeat


def uniform(pool: NegativePool, wanted: Wanted, rng: np.random.Generator) -> list[int]:
    """Every item is as likely as every other."""
    return _successive(np.ones(len(pool.item_ids), dtype=np.int64), wanted, rng)


def popularity(pool: NegativePool, wanted: Wanted, rng: np.random.Generator) -> list[int]:
    """In proportion to the number of training users that touched the item."""
    return _successive(pool.popularity.copy(), wanted, rng)


def retrieved(pool: NegativePool, wanted: Wanted, rng: np.random.Generator) -> list[int]:
    """The items that training users touched most often together with the history; ties by catalogue order."""
    query = np.bincount(wanted.history, minlength=len(pool.item_ids)).astype(np.int64)
    scores: IntArray = pool.touched.T @ (pool.touched @ query)
    scores[wanted.banned] = 0
    best = np.argsort(-scores, kind="stable")[: wanted.count]
    return [int(number) for number in best if scores[number] > 0]


SAMPLERS: dict[Negatives, Callable[[NegativePool, Wanted, np.random.Generator], list[int]]] = {
    "uniform": uniform,
    "popularity": popularity,
    "retrieved": retrieved,
}


def draw_negatives(pool: NegativePool, kind: Negatives, wanted: Wanted, rng: np.random.Generator) -> list[int]:
    """Item numbers by the sampler `kind`; where it runs out of items, the rest by popularity, then uniform.

    Fewer than wanted where the pool holds no more.
    """
    drawn: list[int] = []
    for sampler in (SAMPLERS[kind], popularity, uniform):
        if (missing := wanted.count - len(drawn)) > 0:
            banned = np.concatenate([wanted.banned, np.array(drawn, dtype=np.int64)])
            drawn += sampler(pool, Wanted(missing, banned, wanted.history), rng)
    return drawn


def _successive(weights: IntArray, wanted: Wanted, rng: np.random.Generator) -> list[int]:
    """Draws one item after the other in proportion to `weights` (which it consumes), without replacement."""
    weights[wanted.banned] = 0
    drawn: list[int] = []
    while len(drawn) < wanted.count and (total := int(weights.sum())):
        # Draws with replacement of which repeats are dropped: the same distribution, a round at a time.
        points = rng.integers(0, total, size=wanted.count - len(drawn))
        found = np.searchsorted(np.cumsum(weights), points, side="right")
        new = [int(number) for number in dict.fromkeys(found.tolist())]
        weights[new] = 0
        drawn += new
    return drawn
