"""The recommenders that a ranking model must beat, fitted on the training users of the common split.

Knows nothing of models or engines. Invariant: what held-out users chose counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import RankRequest, order
from rcllm.data import Dataset, histories
from rcllm.data.item_knn import ItemKnn
from rcllm.data.negatives import NegativePool
from rcllm.data.requests import training_histories
from rcllm.fidelity.measures import ndcg

Scores = npt.NDArray[np.float64]


class Baseline(Protocol):
    def score(self, request: RankRequest) -> Scores:
        """One number per candidate, higher is better."""


def training_pool(dataset: Dataset) -> NegativePool:
    training = training_histories(histories(dataset.interactions), dataset.catalogue)
    return NegativePool.of(dataset.catalogue, training.values())


class Popularity:
    """The number of training users that touched an item."""

    def __init__(self, pool: NegativePool) -> None:
        self._pool = pool

    def score(self, request: RankRequest) -> Scores:
        return self._pool.popularity[[self._pool.numbers[i] for i in request.candidates]].astype(np.float64)


class Neighbours:
    """Item-kNN: the sum of a candidate's likeness to the events of the history."""

    def __init__(self, pool: NegativePool, shrinkage: float = 0.0) -> None:
        self._numbers, self._knn = pool.numbers, ItemKnn.of(pool.touched, shrinkage)

    def score(self, request: RankRequest) -> Scores:
        events = [self._numbers[event.item_id] for event in request.history if event.item_id is not None]
        if len(request.candidates) == len(self._numbers):  # the whole catalogue competes
            return self._knn.all_scores(events)[[self._numbers[i] for i in request.candidates]]
        return self._knn.scores(events, [self._numbers[i] for i in request.candidates])


def gain(scores: npt.ArrayLike, request: RankRequest) -> float:
    """NDCG@10 of a request whose user did choose one of the candidates."""
    assert request.positive is not None
    return ndcg(order(np.asarray(scores).tolist()), request.candidates.index(request.positive), 10)


def baseline_gains(dataset: Dataset, requests: Sequence[RankRequest]) -> dict[str, list[float]]:
    """NDCG@10 of each request, by popularity and by item-kNN."""
    pool = training_pool(dataset)
    models: dict[str, Baseline] = {"popularity": Popularity(pool), "item-kNN": Neighbours(pool)}
    return {name: [gain(model.score(request), request) for request in requests] for name, model in models.items()}
