"""A trained decoder answers held-out users, as `rcllm recommend` would serve them.

Knows nothing of measures. Invariant: what a user has seen is denied, and a history is cut where the training cut it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcllm.config import CacheConfig, Config, ModelConfig
from rcllm.core.decoding import RecommendRequest
from rcllm.core.ranking import Event, ItemId
from rcllm.sid.held_out import TOP, Answer, Case
from rcllm.sid.load import load_recommender

_BEAM, _POOL_MB = 50, 64


def answers_of(folder: Path, item_ids: Sequence[ItemId], max_items: int) -> Answer:
    """`folder`: of `rcllm sid train`; `item_ids`: by item number. Raises ModelError."""
    recommender = load_recommender(Config(model=ModelConfig(path=str(folder)), cache=CacheConfig(pool_mb=_POOL_MB)))
    numbers = {item_id: number for number, item_id in enumerate(item_ids)}

    def answer(case: Case) -> list[int]:
        events = tuple(Event(item_ids[number]) for number in case.history[-max_items:])
        deny = tuple(item_ids[number] for number in sorted(set(case.history)))
        asked = RecommendRequest("held out", events, n=TOP, beam=_BEAM, deny=deny)
        return [numbers[item_id] for item_id in recommender.recommend(asked).items]

    return answer
