"""What past requests say about items: how often each was asked for, and which are asked for together.

Knows nothing of nodes. Invariant: the log is read once and never held; what is kept of it is bounded (the neighbours of
each item, and a uniform sample of requests). Items are numbered in the order of `item_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rcllm.core.ranking import ItemId
from rcllm.errors import DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Requests:
    """The items of many requests: those of request i are `items[starts[i] : starts[i + 1]]`, each once."""

    starts: IntArray  # [requests + 1]
    items: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> IntArray:
        return self.items[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """All that a placement is made from."""

    item_ids: tuple[ItemId, ...]
    num_bytes: IntArray  # [items] of the KV of each
    heat: FloatArray  # [items] requests that held it
    near: Any  # sparse [items, items], symmetric: requests that held both, for the top neighbours of each
    sample: Requests  # a uniform sample of the requests
    num_requests: int  # that were read

    @property
    def num_items(self) -> int:
        return len(self.item_ids)


def ragged(rows: Sequence[npt.ArrayLike]) -> Requests:
    """Requests from an array, or list, of item numbers for each."""
    sizes = [len(np.asarray(row)) for row in rows]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    items = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.empty(0, np.int64)
    return Requests(starts, items)


def incidence(requests: Requests, num_items: int) -> Any:
    """Sparse [requests, items]: 1 where a request names the item."""
    ones = np.ones(len(requests.items), dtype=np.int64)
    return sparse.csr_array((ones, requests.items, requests.starts), shape=(len(requests), num_items))


@dataclass(frozen=True, slots=True)
class CollectConfig:
    """What is kept of a log."""

    max_neighbours: int = 50  # of each item; one that is among another's is kept for both
    max_sample: int = 200_000  # requests that halos are learnt from
    chunk: int = 20_000  # requests that are counted at a time
    seed: int = 0


class Collector:
    """Counts requests as they come. Items may be new at any time; their numbers have no gaps at the end."""

    def __init__(self, config: CollectConfig | None = None) -> None:
        self._config = config or CollectConfig()
        self._random = np.random.default_rng(self._config.seed)
        self._waiting: list[IntArray] = []
        self._pairs: Any = sparse.csr_array((0, 0), dtype=np.int64)
        self._heat = np.zeros(0, dtype=np.int64)
        self._sample: list[tuple[float, IntArray]] = []  # (drawn, items): those with the smallest draws are kept
        self._num_requests = 0
        self.num_pruned = 0  # pairs that were forgotten on the way, to bound memory: rare ones of items with very many

    def add(self, items: IntArray) -> None:
        """The items of one request; repeats count once."""
        self._waiting.append(np.unique(items))
        if len(self._waiting) >= self._config.chunk:
            self._count()

    def finish(self, item_ids: Sequence[ItemId], num_bytes: npt.ArrayLike) -> Statistics:
        """What was counted, for items in this order. Raises DataError where a size is missing or not positive."""
        self._count()
        sizes = np.asarray(num_bytes, dtype=np.int64)
        if sizes.shape != (len(item_ids),) or (len(sizes) and sizes.min() < 1):
            raise DataError(f"expected one size of 1 byte or more for each of {len(item_ids):,} items, got {sizes!r}")
        assert len(self._heat) <= len(item_ids), "an item was counted that has no name"
        self._resize(len(item_ids))
        near = _top(self._pairs, self._config.max_neighbours)
        self._keep(self._config.max_sample)
        sample = ragged([items for _, items in self._sample])
        heat = self._heat.astype(np.float64)
        return Statistics(tuple(item_ids), sizes, heat, near.maximum(near.T).tocsr(), sample, self._num_requests)

    def _count(self) -> None:
        if not self._waiting:
            return
        requests, self._waiting = ragged(self._waiting), []
        largest = int(requests.items.max()) + 1 if len(requests.items) else 0
        self._resize(max(len(self._heat), largest))
        table = incidence(requests, len(self._heat))
        pairs = sparse.csr_array(table.T @ table)
        pairs.setdiag(0)
        pairs.eliminate_zeros()
        self._pairs = self._pairs + pairs
        self._heat += np.bincount(requests.items, minlength=len(self._heat))
        self._num_requests += len(requests)
        draws = self._random.random(len(requests))
        self._sample += [(draw, requests[place]) for place, draw in enumerate(draws.tolist())]
        if len(self._sample) > 2 * self._config.max_sample:
            self._keep(self._config.max_sample)
        roomy = 8 * self._config.max_neighbours
        if self._pairs.nnz > 2 * roomy * len(self._heat):
            before = self._pairs.nnz
            self._pairs = _top(self._pairs, roomy)
            self.num_pruned += int(before - self._pairs.nnz)

    def _resize(self, num_items: int) -> None:
        self._pairs.resize((num_items, num_items))
        self._heat = np.concatenate([self._heat, np.zeros(num_items - len(self._heat), np.int64)])

    def _keep(self, count: int) -> None:
        """Of the sample, those with the smallest draws, in the order in which they came."""
        if len(self._sample) > count:
            limit = sorted(draw for draw, _ in self._sample)[count - 1]
            self._sample = [each for each in self._sample if each[0] <= limit]


def collect(
    requests: Requests, item_ids: Sequence[ItemId], num_bytes: npt.ArrayLike, config: CollectConfig | None = None
) -> Statistics:
    """Statistics of requests that are in memory."""
    collector = Collector(config)
    for place in range(len(requests)):
        collector.add(requests[place])
    return collector.finish(item_ids, num_bytes)


def _top(pairs: Any, count: int) -> Any:
    """The largest `count` entries of each row; of equal ones those of earlier items."""
    rows = np.repeat(np.arange(pairs.shape[0]), np.diff(pairs.indptr))
    order = np.lexsort((pairs.indices, -pairs.data, rows))
    rank = np.arange(len(order)) - pairs.indptr[rows]
    kept = order[rank < count]
    at = (rows[kept], pairs.indices[kept])
    return sparse.coo_array((pairs.data[kept], at), shape=pairs.shape).tocsr()
