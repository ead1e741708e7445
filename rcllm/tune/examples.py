"""Training examples from interaction data: requests whose positive is known, made so that prompts can share work.

Users of a batch contribute several targets each, whose histories begin at the same event; under the `blocks` mask they
also share candidates. Never imports torch. Invariant: a batch depends on the data, the settings and its number alone,
and training users alone are in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from blake3 import blake3

from rcllm.core.ranking import Event, Interaction, ItemId, RankRequest, UserId
from rcllm.data import Catalogue, Dataset, histories, split_of
from rcllm.data.item_knn import ItemKnn
from rcllm.data.negatives import NegativePool, Wanted, draw_negatives
from rcllm.data.neighbours import FIELD as NEIGHBOURS
from rcllm.data.neighbours import with_neighbours
from rcllm.data.popularity import with_popularity
from rcllm.data.requests import is_new, training_histories
from rcllm.data.scores import ScoreField, asks_for_scores
from rcllm.errors import ConfigError, DataError
from rcllm.tune.config import ExampleConfig

_VALIDATION_CANDIDATES = 20


class Source(Protocol):
    """Where batches come from. Ids of users and items begin with `prefix`, so that several share one catalogue."""

    dataset: Dataset
    prefix: str
    scores: ScoreField | None  # what stands beside candidates, where the template shows it
    notes: tuple[str, ...]  # what a person should know of what is left out

    def batch(self, rng: np.random.Generator) -> list[RankRequest]: ...
    def validation(self, count: int) -> list[RankRequest]: ...
    def baselines(self, request: RankRequest) -> dict[str, list[float]]: ...
    def identity(self) -> list[object]: ...


NUM_FOLDS = 4  # lists of three quarters of the users are nearly those of all of them


@dataclass(frozen=True, slots=True)
class Fold:
    """One part of the users.

    Whoever is learnt from must not stand in the neighbours that are read: a ranker would learn to find a user's own
    choices there, where no new user has any.
    """

    number: int
    count: int = NUM_FOLDS

    def holds(self, user_id: UserId) -> bool:
        return int.from_bytes(blake3(f"fold {user_id}".encode()).digest()[:8], "big") % self.count == self.number


def training_sets(
    dataset: Dataset, config: ExampleConfig, shown: Collection[str], shown_fresh: Collection[str]
) -> list[TrainingSet]:
    """One set of all users, or where the template shows neighbours one of each fold."""
    folds = [Fold(number) for number in range(NUM_FOLDS)] if NEIGHBOURS in shown else [None]
    return [TrainingSet(dataset, config, shown_fresh, fold) for fold in folds]


class TrainingSet:
    """The users and items of one data set. Ids are prefixed by its name, so that several sets share one catalogue."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        dataset: Dataset,
        config: ExampleConfig,
        shown_fresh: Collection[str] = (),
        fold: Fold | None = None,
    ) -> None:
        """`shown_fresh`: fields that the template shows beside a candidate; those that can be made are.

        `fold`: the users to learn from; neighbours are made of the others. None: of all, and no neighbours are made.
        """
        self.dataset, self.config = with_popularity(dataset), config
        self.prefix = f"{dataset.name}/" if fold is None else f"{dataset.name}/{fold.number}/"
        by_user = histories(dataset.interactions)
        training = training_histories(by_user, dataset.catalogue)
        self.pool = NegativePool.of(dataset.catalogue, training.values())
        long_enough = [rows for rows in by_user.values() if len(rows) > config.least_history]
        if fold is not None:
            inside = {user for user in by_user if fold.holds(user)}
            catalogue = with_neighbours(self.dataset.catalogue, dataset.interactions, without=inside)
            self.dataset = replace(self.dataset, catalogue=catalogue)
            long_enough = [rows for rows in long_enough if rows[0].user_id in inside]
        self.users = [rows for rows in long_enough if split_of(rows[0].user_id) == "train"]
        self.others = [
            rows for rows in long_enough if split_of(rows[0].user_id) == "validation" and is_new(rows, len(rows) - 1)
        ]
        if not any(is_new(rows, at) for rows in self.users for at in range(config.least_history, len(rows))):
            raise DataError(
                f"{dataset.name}: no training user has an item that was new after {config.least_history} or more "
                "events, to learn from"
            )
        self.scores = ScoreField.of(dataset.catalogue, dataset.interactions) if asks_for_scores(shown_fresh) else None
        self._knn = self.scores.knn if self.scores else ItemKnn.of(self.pool.touched)

    def batch(self, rng: np.random.Generator) -> list[RankRequest]:
        """One batch of requests, candidates in random order."""
        config = self.config
        places: list[tuple[tuple[Interaction, ...], int, int]] = []  # a user's rows, first event, target
        while len(places) < config.prompts_per_batch:
            rows = self.users[int(rng.integers(len(self.users)))]
            last = int(rng.integers(config.least_history, len(rows)))
            first = max(0, last - config.num_history)
            targets = range(last, max(first + config.least_history, last - config.targets_per_user + 1) - 1, -1)
            room = config.prompts_per_batch - len(places)
            places += [(rows, first, target) for target in targets if is_new(rows, target)][:room]
        count = config.num_candidates - 1 - config.borrowed
        drawn = [self._draw(rows, first, target, count, rng) for rows, first, target in places]
        shared = list(
            dict.fromkeys(
                item
                for (rows, _, at), own in zip(places, drawn, strict=True)
                for item in (self.pool.numbers[rows[at].item_id], *own)
            )
        )
        return [self._request(*place, own, shared, rng) for place, own in zip(places, drawn, strict=True)]

    def _draw(
        self, rows: Sequence[Interaction], first: int, target: int, count: int, rng: np.random.Generator
    ) -> list[int]:
        """A prompt's own negatives: of each kind in turn."""
        config = self.config
        banned = np.array(sorted({self.pool.numbers[row.item_id] for row in rows}), dtype=np.int64)
        history = np.array([self.pool.numbers[row.item_id] for row in rows[first:target]], dtype=np.int64)
        drawn: list[int] = []
        for turn, kind in enumerate(config.negatives):
            some = count // len(config.negatives) + (turn < count % len(config.negatives))
            wanted = Wanted(some, np.concatenate([banned, np.array(drawn, dtype=np.int64)]), history)
            drawn += draw_negatives(self.pool, kind, wanted, rng)
        return drawn

    def _request(
        self,
        rows: Sequence[Interaction],
        first: int,
        target: int,
        own: Sequence[int],
        shared: Sequence[int],
        rng: np.random.Generator,
    ) -> RankRequest:
        touched = {self.pool.numbers[row.item_id] for row in rows} | set(own)
        others = [number for number in shared if number not in touched]
        borrowed = rng.permutation(len(others))[: self.config.borrowed]
        numbers = [self.pool.numbers[rows[target].item_id], *own, *(others[i] for i in borrowed)]
        names = [self._name(number) for number in numbers]
        return RankRequest(
            request_id=f"{self.prefix}{rows[target].user_id}-{target}",
            candidates=tuple(names[slot] for slot in rng.permutation(len(names))),
            history=tuple(Event(item_id=ItemId(self.prefix + row.item_id)) for row in rows[first:target]),
            user_id=UserId(self.prefix + rows[target].user_id),
            volatile=dict(zip(names, self._fresh(rows[first:target], numbers), strict=False)),
            positive=names[0],
        )

    def _fresh(self, history: Sequence[Interaction], candidates: Sequence[int]) -> list[dict[str, str]]:
        """The score field of each candidate, where the template shows it; the user's own choices count for nothing."""
        if self.scores is None:
            return []
        own = self.scores.chosen_by.get(history[0].user_id, ())
        before = [self.pool.numbers[row.item_id] for row in history]
        return self.scores.words.write(self.scores.knn.scores(before, candidates, own).tolist())

    def baselines(self, request: RankRequest) -> dict[str, list[float]]:
        """What a ranker must beat, as scores of the candidates of a validation request."""
        candidates, history = (
            [self.pool.numbers[ItemId(item_id.removeprefix(self.prefix))] for item_id in item_ids]
            for item_ids in (request.candidates, [e.item_id for e in request.history if e.item_id is not None])
        )
        return {
            "popularity": self.pool.popularity[candidates].astype(float).tolist(),
            "item-kNN": self._knn.scores(history, candidates).tolist(),
        }

    def validation(self, count: int) -> list[RankRequest]:
        """The last items of `count` validation users among 19 negatives of the same kinds as in training.

        Fewer where there are fewer users. Raises DataError where there is none.
        """
        if not self.others:
            raise DataError(
                f"{self.dataset.name}: no validation user ends with an item that was new after "
                f"{self.config.least_history} or more events, so that nothing would tell when to stop; more users are "
                "needed"
            )
        requests = []
        for rows in self.others[:count]:
            rng = np.random.default_rng([count, len(rows), self.pool.numbers[rows[-1].item_id]])
            place = rows, max(0, len(rows) - 1 - self.config.num_history), len(rows) - 1
            own = self._draw(*place, _VALIDATION_CANDIDATES - 1, rng)
            requests.append(self._request(*place, own, (), rng))
        return requests

    def identity(self) -> list[object]:
        """What a training depends on, for a digest: any text of an item, and who chose what."""
        rows = [(row.user_id, row.item_id) for row in self.dataset.interactions]
        return [rows, [(item_id, list(item.fields.items())) for item_id, item in self.dataset.catalogue.items()]]

    def _name(self, number: int) -> ItemId:
        return ItemId(self.prefix + self.pool.item_ids[number])


def joined_catalogue(sources: Sequence[Source]) -> Catalogue:
    """The items of all sources. Raises ConfigError where two have one name."""
    if len({source.prefix for source in sources}) < len(sources):
        names = ", ".join(source.dataset.name for source in sources)
        raise ConfigError(f"data sets must differ in name, got {names}")
    return Catalogue(
        replace(item, item_id=ItemId(source.prefix + item.item_id))
        for source in sources
        for item in source.dataset.catalogue.values()
    )


def batch_of(sources: Sequence[Source], number: int, seed: int) -> list[RankRequest]:
    """Batch `number` of the training: of one source, all sources equally often."""
    rng = np.random.default_rng([seed, number])
    return sources[int(rng.integers(len(sources)))].batch(rng)
