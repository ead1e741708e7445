"""Training examples from a log of requests: lists that were asked of a ranker, whether or not a choice is known.

Their candidates are those that retrieval found, as no made list's are. Never imports torch. Invariant: requests of one
user are all learnt from, or all decide when to stop, or are all left out for a test, by the common split; the batch
depends on log, settings and number alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from rcllm.core.ranking import ItemId, RankRequest, UserId
from rcllm.data import Catalogue, Dataset, Split, split_of
from rcllm.data.neighbours import FIELD as NEIGHBOURS
from rcllm.data.popularity import FIELD as CHOSEN
from rcllm.data.popularity import with_made_fields
from rcllm.data.scores import ScoreField, made_scores
from rcllm.errors import ConfigError, DataError
from rcllm.tune.config import ExampleConfig

# what becomes of some of the requests
_ELSEWHERE = "name a positive that is none of their candidates, so that it counts as not known"
_UNKNOWN = "do not say which candidate was chosen, and are left out: to learn from them, give a teacher"
_TEST = "are of test users, and are left out"


class LoggedSet:
    """The requests of one log over the items of one data set. Ids are prefixed by its name, as in a `TrainingSet`."""

    def __init__(
        self,
        dataset: Dataset,
        requests: Sequence[RankRequest],
        config: ExampleConfig,
        shown: Collection[str] = (),
        shown_fresh: Collection[str] = (),
        *,
        taught: bool = True,
    ) -> None:
        """`taught`: whether a teacher scores the requests. Without one, those are left out that do not say what was
        chosen.

        Raises ConfigError for a template that shows neighbours, DataError for requests that name unknown items, and
        where nothing is left to learn from or to hold out.
        """
        if NEIGHBOURS in shown:
            raise ConfigError(
                f"the template shows {NEIGHBOURS!r}, which are made of what all training users chose: a ranker would "
                "learn to find there what they chose, where no new user has any. Use another template, or leave out "
                "the log: of interactions, a ranker learns with the neighbours that other users make"
            )
        self.config, self.prefix = config, f"{dataset.name}/"
        self.scores: ScoreField | None = made_scores(dataset.catalogue, shown_fresh)
        made = with_made_fields(dataset.catalogue, {*shown, CHOSEN})
        self.dataset = replace(dataset, catalogue=Catalogue(made.values()))
        self._check(requests)
        counted = dict.fromkeys((_ELSEWHERE, _UNKNOWN, _TEST), 0)
        of_split: dict[Split, list[RankRequest]] = {"train": [], "validation": [], "test": []}
        for request in requests:
            if request.positive is not None and request.positive not in request.candidates:
                counted[_ELSEWHERE] += 1
            if request.positive in request.candidates or taught:
                of_split[_split(request)].append(self._named(request))
            else:
                counted[_UNKNOWN] += 1
        counted[_TEST] = len(of_split["test"])
        told = ((count, what) for what, count in counted.items() if count)
        self.notes = tuple(f"{count:,} of {len(requests):,} requests {what}" for count, what in told)
        self.requests, self._validation = of_split["train"], of_split["validation"]
        if not self.requests or not self._validation:
            left_out = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise DataError(
                f"{dataset.name}: expected requests of training and of validation users, got {len(self.requests):,} "
                f"and {len(self._validation):,}{left_out}; give a longer log"
            )

    def batch(self, rng: np.random.Generator) -> list[RankRequest]:
        """Requests drawn at random, each once."""
        count = min(self.config.prompts_per_batch, len(self.requests))
        return [self.requests[int(place)] for place in rng.permutation(len(self.requests))[:count]]

    def validation(self, count: int) -> list[RankRequest]:
        """The first `count` requests of validation users; fewer where there are fewer."""
        return self._validation[:count]

    def baselines(self, request: RankRequest) -> dict[str, list[float]]:
        """None: a log need not say what was chosen."""
        return {}

    def identity(self) -> list[object]:
        """What a training depends on, for a digest."""
        told = [
            (
                request.request_id,
                request.candidates,
                [(event.item_id, event.text) for event in request.history],
                request.positive,
                [(i, list(fields.items())) for own in (request.volatile, request.texts) for i, fields in own.items()],
            )
            for request in (*self.requests, *self._validation)
        ]
        return [told, [(item_id, list(item.fields.items())) for item_id, item in self.dataset.catalogue.items()]]

    def _named(self, given: RankRequest) -> RankRequest:
        """As a source names users and items, with the scores that are shown; a positive is one of the candidates."""
        request = self.scores.fill(given) if self.scores else given
        positive = request.positive if request.positive in request.candidates else None
        return replace(
            request,
            candidates=tuple(map(self._id, request.candidates)),
            history=tuple(
                replace(event, item_id=self._id(event.item_id)) if event.item_id else event for event in request.history
            ),
            user_id=UserId(self.prefix + request.user_id) if request.user_id else None,
            volatile={self._id(item_id): fields for item_id, fields in request.volatile.items()},
            texts={self._id(item_id): fields for item_id, fields in request.texts.items()},
            positive=self._id(positive) if positive is not None else None,
            options=None,
        )

    def _id(self, item_id: ItemId) -> ItemId:
        return ItemId(self.prefix + item_id)

    def _check(self, requests: Sequence[RankRequest]) -> None:
        for request in requests:
            named = (*request.candidates, *(e.item_id for e in request.history if e.item_id is not None))
            unknown = [i for i in named if i not in self.dataset.catalogue and i not in request.texts]
            if unknown:
                raise DataError(
                    f"request {request.request_id!r} names item {unknown[0]!r}, which {self.dataset.name} lacks: leave "
                    "such requests out, or give the data set that has it"
                )


def _split(request: RankRequest) -> Split:
    """By the user, or by the request where nobody is named."""
    return split_of(UserId(request.user_id or request.request_id))
