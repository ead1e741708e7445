"""A trained decoder answers held-out users, as `rcllm recommend` would serve them.

Knows nothing of measures. Invariant: what a user has seen is denied, and histories go in whole: who reads how much of
them is the recommender's business, then as now.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcllm.codes.knn import Knn
from rcllm.config import CacheConfig, Config, ModelConfig
from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import Event, ItemId
from rcllm.errors import answered
from rcllm.sid.blend import Searched, blended, nearest
from rcllm.sid.held_out import TOP, Answer, Case, Histories, cases_of
from rcllm.sid.load import load_recommender
from rcllm.sid.model_folder import load_codes, save_knn

_BEAM, _POOL_MB = 64, 64


def add_knn(folder: Path, train: Histories, validation: Histories) -> Knn:
    """Puts an item-kNN of training users beside a trained decoder, with the share that serves validation users best.

    Histories are of item numbers, by the decoder's catalogue. Raises ModelError, DataError.
    """
    code_index = load_codes(folder)
    item_ids = tuple(code_index.item_ids)
    searched = HeldOut(folder, item_ids).searched(cases_of(validation)[0])
    knn = blended(nearest(train, item_ids), code_index, searched)
    save_knn(folder, knn)
    return knn


class HeldOut:
    """Asks a folder of `rcllm sid train` about held-out users, whose items are numbers."""

    def __init__(self, folder: Path, item_ids: Sequence[ItemId]) -> None:
        """`item_ids`: by item number. Raises ModelError."""
        config = Config(model=ModelConfig(path=str(folder)), cache=CacheConfig(pool_mb=_POOL_MB))
        self.recommender, self.item_ids = load_recommender(config), item_ids
        self._numbers = {item_id: number for number, item_id in enumerate(item_ids)}

    def answer(self, knn: float | None = None) -> Answer:
        """`knn`: as in a request."""

        def answer(case: Case) -> list[int]:
            (response,) = self._ask([case], TOP, knn)
            return [self._numbers[item_id] for item_id in response.items]

        return answer

    def searched(self, cases: Sequence[Case]) -> list[Searched]:
        """What the decoder alone finds, as deep as it looks."""
        return [
            Searched(
                self._ids(case.history), self.item_ids[case.target], dict(zip(each.items, each.scores, strict=True))
            )
            for case, each in zip(cases, self._ask(cases, _BEAM, 0.0), strict=True)
        ]

    def _ask(self, cases: Sequence[Case], n: int, knn: float | None) -> list[RecommendResponse]:
        return answered(
            self.recommender.recommend_batch(
                [
                    RecommendRequest(
                        str(number),
                        tuple(map(Event, self._ids(case.history))),
                        n=n,
                        beam=_BEAM,
                        deny=self._ids(sorted(set(case.history))),
                        knn=knn,
                    )
                    for number, case in enumerate(cases)
                ]
            )
        )

    def _ids(self, numbers: Sequence[int]) -> tuple[ItemId, ...]:
        return tuple(self.item_ids[number] for number in numbers)
