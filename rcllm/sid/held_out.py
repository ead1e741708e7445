"""What a decoder of semantic IDs is worth: it is held against a guess, popularity and item-kNN on held-out users.

The target is a user's last item, after the items before it, and the whole catalogue competes. Nobody may recommend what
the user has already seen, so users whose target stands in their own history are left out and counted. Never imports
torch: whoever has a model gives its answers. Invariant: all ways answer the same users and learn from training users
alone, and plain item-kNN reads as much of a history as the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import ItemId
from rcllm.data.item_knn import ItemKnn
from rcllm.drafts.lightgcn import interaction_matrix
from rcllm.fidelity.measures import chance_ndcg

TOP = 10
_MAX_USERS = 500  # that are asked: a minute of work at most
_EXPECTED_SHARE = 4  # items per first-level code under which little is shared
_FEW_USERS = 1000  # training users with which decoders began to beat popularity

Named = TypeVar("Named", int, ItemId)
Histories = Sequence[Sequence[int]]  # item numbers, oldest first
Answer = Callable[["Case"], Sequence[int]]  # the best TOP items for a case, best first


@dataclass(frozen=True, slots=True)
class Case:
    """What one held-out user is asked: which item follows the history?"""

    history: tuple[int, ...]  # item numbers, oldest first
    target: int


@dataclass(frozen=True, slots=True)
class Worth:
    """How good one way of recommending is, as means over the held-out users."""

    recall: float  # share of the targets that are among the first ten
    ndcg: float  # NDCG@10


@dataclass(frozen=True, slots=True)
class Comparison:
    """The model beside what it must beat."""

    num_users: int
    num_left_out: int  # users whose target stands in their own history
    model: Worth  # with the item-kNN that it carries
    alone: Worth  # its decoder alone
    guess: Worth  # expected, of items drawn at random among those that the user has not seen
    popularity: Worth
    item_knn: Worth

    def worse_than(self) -> list[str]:
        """The ways that are as good as the model or better, by NDCG@10: the strongest reproach first."""
        ways = {"a guess": self.guess, "popularity": self.popularity, "item-kNN": self.item_knn}
        return [name for name, way in ways.items() if self.model.ndcg <= way.ndcg]


def cases_of(histories: Histories) -> tuple[list[Case], int]:
    """The cases of the first users that can be asked, and how many users were left out on the way to them."""
    long_enough = [history for history in histories if len(history) > 1]
    found = [Case(tuple(history[:-1]), history[-1]) for history in long_enough if history[-1] not in history[:-1]]
    return found[:_MAX_USERS], len(long_enough) - len(found)


def compare_held_out(
    model: Answer, alone: Answer, train: Histories, held_out: Histories, num_items: int, max_items: int
) -> Comparison | None:
    """`alone`: the model's decoder without item-kNN; `max_items`: how much of a history the decoder reads, its end.

    None: no held-out user can be asked.
    """
    cases, num_left_out = cases_of(held_out)
    if not cases:
        return None
    touched = interaction_matrix(train, num_items)
    popularity = np.asarray(touched.sum(axis=0), dtype=np.float64)
    knn = ItemKnn.of(touched)

    def by_popularity(case: Case) -> list[int]:
        return _best(popularity, case)

    def by_neighbours(case: Case) -> list[int]:
        return _best(knn.all_scores(case.history[-max_items:]), case)

    return Comparison(
        len(cases),
        num_left_out,
        _worth(model, cases),
        _worth(alone, cases),
        _guess(cases, num_items),
        _worth(by_popularity, cases),
        _worth(by_neighbours, cases),
    )


def advice(num_training_users: int, items_per_first_code: float, *, still_better: bool) -> list[str]:
    """What to try where a model is worse than it should be. `still_better`: its last epoch was its best."""
    tries = []
    if num_training_users < _FEW_USERS:
        tries.append(f"more users (it learnt from {num_training_users:,}; some thousand are usual)")
    if still_better:
        tries.append("longer training (the last epoch was the best: more --epochs or --minutes)")
    if items_per_first_code < _EXPECTED_SHARE:
        tries.append(
            f"smaller codes (a first-level code has {items_per_first_code:.1f} items: run `rcllm sid build` again "
            "without --size and --levels)"
        )
    return tries or ["codes that know who touched what (`rcllm sid build --interactions`), or another --seed"]


def _best(scores: npt.NDArray[np.float64], case: Case) -> list[int]:
    """Ties go to the earlier item of the catalogue."""
    scores = scores.copy()
    scores[list(case.history)] = -np.inf
    best = np.argsort(-scores, kind="stable")[:TOP]
    return [int(item) for item in best if scores[item] > -np.inf]


def gain(items: Sequence[Named], target: Named) -> float:
    """DCG@10 of a list with one right item, best first; at most 1."""
    best = list(items[:TOP])
    return 1.0 / math.log2(2 + best.index(target)) if target in best else 0.0


def _worth(answer: Answer, cases: Sequence[Case]) -> Worth:
    gains = [gain(answer(case), case.target) for case in cases]
    return Worth(sum(each > 0 for each in gains) / len(gains), sum(gains) / len(gains))


def _guess(cases: Sequence[Case], num_items: int) -> Worth:
    left = [num_items - len(set(case.history)) for case in cases]
    return Worth(
        sum(min(TOP, count) / count for count in left) / len(left),
        sum(chance_ndcg(count, TOP) for count in left) / len(left),
    )
