"""A score that a team already has, as words that a ranker reads beside each candidate: fresh fields `rank` and `match`.

Retrieval, item-kNN or another ranker knows what no text says. Its number is written as two words: the candidate's rank
among those of the request, and a grade by quantiles of such scores. Fresh, because it depends on the user; two words,
because fresh tokens are what a request pays for. Knows nothing of prompts. Invariant: the score field of a data set
sees training users alone, and leaves out the user who is asked about.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rcllm.core.ranking import Interaction, Item, ItemId, RankRequest, UserId
from rcllm.data.catalogue import Catalogue
from rcllm.data.interactions import histories
from rcllm.data.item_knn import ItemKnn
from rcllm.data.negatives import NegativePool, Wanted, draw_negatives
from rcllm.data.requests import training_histories
from rcllm.errors import ConfigError

RANK, MATCH = "rank", "match"
FIELDS = frozenset({RANK, MATCH})
_RANKS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_LATER, _NONE = "later", "none"
_GRADES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NO_GRADE = "zero"
_FITTED_ON = 500  # training users whose candidates' scores say where grades begin
_CANDIDATES = 20


@dataclass(frozen=True, slots=True)
class ScoreWords:
    """How a number becomes words. A score of 0 or less says nothing of a candidate: it has no rank, and grade zero."""

    edges: tuple[float, ...]  # ascending: where the second and every later grade begin

    def __post_init__(self) -> None:
        if len(self.edges) != len(_GRADES) - 1 or any(a > b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ConfigError(
                f"expected {len(_GRADES) - 1} ascending numbers, between {len(_GRADES)} grades of scores, got "
                f"{list(self.edges)}"
            )

    @classmethod
    def of(cls, scores: Sequence[float]) -> ScoreWords:
        """Grades that hold equally many of those of `scores` that are positive."""
        positive = [score for score in scores if score > 0] or [1.0]
        edges = np.quantile(positive, np.arange(1, len(_GRADES)) / len(_GRADES))
        return cls(tuple(float(f"{edge:.3g}") for edge in edges))

    def write(self, scores: Sequence[float]) -> list[dict[str, str]]:
        """The fields of each candidate of one request. Equal scores share the better rank."""
        return [{RANK: self._rank(score, scores), MATCH: self._grade(score)} for score in scores]

    def _rank(self, score: float, scores: Sequence[float]) -> str:
        if not score > 0:
            return _NONE
        better = sum(other > score for other in scores)
        return _RANKS[better] if better < len(_RANKS) else _LATER

    def _grade(self, score: float) -> str:
        return _GRADES[sum(score >= edge for edge in self.edges)] if score > 0 else _NO_GRADE


@dataclass(frozen=True, slots=True)
class ScoreField:
    """Item-kNN over the training users of one data set, in words."""

    knn: ItemKnn
    numbers: Mapping[ItemId, int]  # of the items
    chosen_by: Mapping[UserId, tuple[int, ...]]  # training user → what that user chose
    words: ScoreWords

    @classmethod
    def of(
        cls,
        catalogue: Mapping[ItemId, Item],
        interactions: Iterable[Interaction],
        shrinkage: float = 0.0,
        seed: int = 0,
    ) -> ScoreField:
        """Grades are fitted on made requests of training users, each left out of their own scores."""
        users = training_histories(histories(interactions), catalogue)
        pool = NegativePool.of(catalogue, users.values())
        chosen = {user: tuple(sorted({pool.numbers[item_id] for item_id in items})) for user, items in users.items()}
        field = cls(ItemKnn.of(pool.touched, shrinkage), pool.numbers, chosen, ScoreWords.of(()))
        rng = np.random.default_rng([seed, len(users)])
        found: list[float] = []
        long_enough = [user for user, items in users.items() if len(items) > 1]
        for place in rng.permutation(len(long_enough))[:_FITTED_ON]:
            user = long_enough[place]
            *before, last = (pool.numbers[item_id] for item_id in users[user])
            wanted = Wanted(_CANDIDATES - 1, np.array(chosen[user]), np.array(before))
            drawn = draw_negatives(pool, "popularity" if place % 2 else "uniform", wanted, rng)
            found += field.knn.scores(before[-8:], [last, *drawn], chosen[user]).tolist()
        return replace(field, words=ScoreWords.of(found))

    def scores(self, request: RankRequest) -> list[float]:
        """One for each candidate; 0 for one, and of an event, that is not in the catalogue."""
        history = [self.numbers[e.item_id] for e in request.history if e.item_id and e.item_id in self.numbers]
        known = [i for i, item_id in enumerate(request.candidates) if item_id in self.numbers]
        own = self.chosen_by.get(request.user_id, ()) if request.user_id is not None else ()
        scores = np.zeros(len(request.candidates))
        if known:
            scores[known] = self.knn.scores(history, [self.numbers[request.candidates[i]] for i in known], own)
        return [float(score) for score in scores]

    def fill(self, request: RankRequest) -> RankRequest:
        """The request with both fields for each candidate, unless it brings one of them itself."""
        if any(FIELDS & fields.keys() for fields in request.volatile.values()):
            return request
        written = zip(request.candidates, self.words.write(self.scores(request)), strict=True)
        return replace(
            request,
            volatile={**request.volatile, **{i: {**request.volatile.get(i, {}), **words} for i, words in written}},
        )


def made_scores(catalogue: Mapping[ItemId, Item], shown_fresh: Collection[str]) -> ScoreField | None:
    """The score field, where a template shows it, the catalogue knows its interactions, and no item brings it."""
    if not asks_for_scores(shown_fresh) or not isinstance(catalogue, Catalogue) or not catalogue.interactions:
        return None
    if any(FIELDS & item.volatile.keys() for item in catalogue.values()):
        return None
    return ScoreField.of(catalogue, catalogue.interactions)


def asks_for_scores(shown_fresh: Collection[str]) -> bool:
    """Whether a template shows a field that is made here."""
    return bool(FIELDS & set(shown_fresh))
