"""Training examples from a log of requests: lists that were asked of a ranker, whether or not a choice is known.

Their candidates are those that retrieval found, as no made list's are. Never imports torch. Invariant: requests of one
user are all learnt from or all held out, by the common split; the batch depends on log, settings and number alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rcllm.core.ranking import Item, ItemId, RankRequest, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.data.catalogue import field_shares
from rcllm.data.popularity import FIELD as CHOSEN
from rcllm.data.popularity import with_made_fields
from rcllm.data.scores import ScoreField, made_scores
from rcllm.errors import DataError
from rcllm.tune.config import ExampleConfig


class LoggedSet:
    """The requests of one log over the items of one data set. Ids are prefixed by its name, as in a `TrainingSet`."""

    def __init__(
        self,
        dataset: Dataset,
        requests: Sequence[RankRequest],
        config: ExampleConfig,
        shown: Collection[str] = (),
        shown_fresh: Collection[str] = (),
    ) -> None:
        """Raises DataError for requests that name unknown items, and where one split has none."""
        self.config, self.prefix = config, f"{dataset.name}/"
        self.scores: ScoreField | None = made_scores(dataset.catalogue, shown_fresh)
        made = with_made_fields(dataset.catalogue, {*shown, CHOSEN})
        self.dataset = replace(dataset, catalogue=Catalogue(made.values()))
        self._check(requests)
        filled = [self.scores.fill(request) if self.scores else request for request in requests]
        self.requests = [self._named(each) for each in filled if _split(each) == "train"]
        self._held_out = [self._named(each) for each in filled if _split(each) != "train"]
        if not self.requests or not self._held_out:
            raise DataError(
                f"{dataset.name}: expected requests of training users and of others, got {len(self.requests):,} and "
                f"{len(self._held_out):,}; give a longer log"
            )

    def batch(self, rng: np.random.Generator) -> list[RankRequest]:
        """Requests drawn at random, each once."""
        count = min(self.config.prompts_per_batch, len(self.requests))
        return [self.requests[int(place)] for place in rng.permutation(len(self.requests))[:count]]

    def validation(self, count: int) -> list[RankRequest]:
        """The first `count` requests of users that are not learnt from; fewer where there are fewer."""
        return self._held_out[:count]

    def items(self) -> Mapping[ItemId, Item]:
        catalogue = self.dataset.catalogue
        return {self._id(i): Item(self._id(i), item.fields, item.volatile) for i, item in catalogue.items()}

    def field_shares(self, names: Sequence[str]) -> dict[str, float]:
        return {name: round(share, 3) for name, share in field_shares(self.dataset.catalogue, names).items()}

    def baselines(self, request: RankRequest) -> dict[str, list[float]]:
        """None: a log need not say what was chosen."""
        return {}

    def identity(self) -> list[object]:
        """What a training depends on, for a digest."""
        told = [
            (r.request_id, r.candidates, [(e.item_id, e.text) for e in r.history], r.positive) for r in self.requests
        ]
        return [told, [(item_id, list(item.fields.items())) for item_id, item in self.dataset.catalogue.items()]]

    def _named(self, request: RankRequest) -> RankRequest:
        return replace(
            request,
            candidates=tuple(map(self._id, request.candidates)),
            history=tuple(
                replace(event, item_id=self._id(event.item_id)) if event.item_id else event for event in request.history
            ),
            user_id=UserId(self.prefix + request.user_id) if request.user_id else None,
            volatile={self._id(item_id): fields for item_id, fields in request.volatile.items()},
            texts={self._id(item_id): fields for item_id, fields in request.texts.items()},
            positive=self._id(request.positive) if request.positive else None,
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


def _split(request: RankRequest) -> str:
    """By the user, or by the request where nobody is named."""
    return split_of(UserId(request.user_id or request.request_id))
