"""Where candidates of made requests come from: retrieval decides how local they are, so benchmarks name the source.

Knows nothing of nodes. Items are numbers. Invariant: a source sees training histories and the history of a request, and
never what comes after it; it names no item of the history, and none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rcllm.cluster.statistics import IntArray, Requests, incidence, ragged
from rcllm.data.item_knn import ItemKnn

_ROWS = 512  # histories whose scores are made at a time: they are nearly dense


class Candidates(Protocol):
    """A source of candidates."""

    def __call__(self, histories: Requests, count: int, rng: np.random.Generator) -> Requests:
        """For each history `count` items that are not in it; fewer where the catalogue has no more."""


@dataclass(frozen=True, slots=True)
class MostAlike:
    """The items whose users are most like those of the history, by item-kNN.

    Items that share no user with the history come last, by popularity; ties go to the more popular.
    """

    likeness: Any  # sparse [items, items], float32
    popularity: IntArray  # [items]

    @classmethod
    def of(cls, touched: Any) -> MostAlike:
        """`touched`: sparse [users, items], of training users."""
        knn = ItemKnn.of(touched)
        return cls(knn.likeness.astype(np.float32), knn.popularity)

    def __call__(self, histories: Requests, count: int, rng: np.random.Generator) -> Requests:
        last = 1e-6 * self.popularity / max(int(self.popularity.max()), 1)  # below every cosine that is not zero
        rows = incidence(histories, len(self.popularity)).astype(np.float32)
        best = []
        for start in range(0, len(histories), _ROWS):
            scores = (rows[start : start + _ROWS] @ self.likeness).toarray() + last.astype(np.float32)
            best += _largest(scores, histories, start, count)
        return ragged(best)


@dataclass(frozen=True, slots=True)
class Popular:
    """In proportion to the number of training users, without replacement; items that nobody touched come last."""

    popularity: IntArray

    def __call__(self, histories: Requests, count: int, rng: np.random.Generator) -> Requests:
        weights = np.log(np.maximum(self.popularity, 1e-9))
        return _drawn(weights, histories, count, rng)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every item is as likely as every other."""

    num_items: int

    def __call__(self, histories: Requests, count: int, rng: np.random.Generator) -> Requests:
        return _drawn(np.zeros(self.num_items), histories, count, rng)


def _drawn(weights: Any, histories: Requests, count: int, rng: np.random.Generator) -> Requests:
    """The largest sums of log-weight and Gumbel noise: a draw without replacement (Efraimidis & Spirakis 2006)."""
    best = []
    for start in range(0, len(histories), _ROWS):
        num = min(_ROWS, len(histories) - start)
        noise = rng.gumbel(size=(num, len(weights)))
        best += _largest(noise + weights, histories, start, count)
    return ragged(best)


def _largest(scores: Any, histories: Requests, start: int, count: int) -> list[IntArray]:
    """The items with the largest scores in each row, best first and ties in order, without the row's history."""
    found = []
    for row, values in enumerate(scores):
        values[histories[start + row]] = -np.inf
        num = min(count, len(values) - len(histories[start + row]))
        least = np.partition(values, -num)[-num] if num else np.inf
        better, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        best = np.concatenate([better, equal[: num - len(better)]])
        found.append(best[np.lexsort((best, -values[best]))].astype(np.int64))
    return found


SOURCES: Mapping[str, Callable[[Any], Candidates]] = {  # each from sparse [training users, items]
    "item_knn": MostAlike.of,
    "popularity": lambda touched: Popular(np.asarray(touched.sum(axis=0)).astype(np.int64)),
    "uniform": lambda touched: Uniform(touched.shape[1]),
}
