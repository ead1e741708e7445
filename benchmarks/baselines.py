"""The recommenders that a ranking model must beat, fitted on the training users of the common split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rcllm.core.ranking import RankRequest
from rcllm.data import Dataset, histories, split_of
from rcllm.data.negatives import NegativePool

Scores = npt.NDArray[np.float64]


class Baseline(Protocol):
    def score(self, request: RankRequest) -> Scores:
        """One number per candidate, higher is better."""


def training_pool(dataset: Dataset) -> NegativePool:
    training = [rows for user, rows in histories(dataset.interactions).items() if split_of(user) == "train"]
    return NegativePool.of(dataset.catalogue, ([row.item_id for row in rows] for rows in training))


class Popularity:
    """The number of training users that touched an item."""

    def __init__(self, pool: NegativePool) -> None:
        self._pool = pool

    def score(self, request: RankRequest) -> Scores:
        return self._pool.popularity[[self._pool.numbers[i] for i in request.candidates]].astype(np.float64)


class ItemKnn:
    """Sum over the history of the cosine between items' training users; Sarwar et al. 2001, "Item-based CF"."""

    def __init__(self, pool: NegativePool) -> None:
        self._pool = pool
        norms = np.sqrt(np.maximum(pool.popularity, 1))
        self._users = sparse.csc_array(pool.touched @ sparse.diags_array(1.0 / norms))  # columns of length one

    def score(self, request: RankRequest) -> Scores:
        candidates = self._numbers(request.candidates)
        events = self._numbers([event.item_id for event in request.history if event.item_id is not None])
        return np.asarray((self._users[:, candidates].T @ self._users[:, events]).sum(axis=1), dtype=np.float64)

    def _numbers(self, item_ids: Sequence[str]) -> list[int]:
        return [self._pool.numbers[item_id] for item_id in item_ids]  # type: ignore[index]
