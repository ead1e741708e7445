"""Changes of what is served: items with new texts, items that go, users who are erased.

Knows nothing of HTTP. Invariant: when a change of an item is made, every request that could have read its old text has
ended; a change that is refused has changed nothing; when a user is erased, no block, draft or queue holds that user's
words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rcllm.codes.updates import Update
from rcllm.core.ranking import Item, ItemId, whose
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import DataError, RequestError
from rcllm.fidelity.online import OnlineGuard
from rcllm.server.backend import NO_SHARDS, Change, Changed, EraseUser, PlaceItems, PutItems, RemoveItems
from rcllm.server.pools import DraftPoolsByName
from rcllm.sid.vocabulary import with_sid
from rcllm.wire.bodies import named


class Keeper:
    """Makes one change at a time; blocks until it holds."""

    def __init__(
        self, engine: Engine, recommender: Recommender | None, pools: DraftPoolsByName, guard: OnlineGuard | None
    ) -> None:
        self._engine, self._recommender, self._pools, self._guard = engine, recommender, pools, guard

    def make(self, change: Change) -> Changed:
        """Raises RcllmError."""
        match change:
            case PutItems():
                return self._put(change)
            case RemoveItems():
                return self._remove(change.item_ids)
            case EraseUser():
                return self._erase(change)
            case PlaceItems():
                raise RequestError(NO_SHARDS)
        raise AssertionError(change)

    def _put(self, change: PutItems) -> Changed:
        recoded = self._recoded(change.codes)
        made = self._engine.upsert_items(change.items)
        if self._recommender is not None:
            self._recode(self._recommender, change, recoded)
        return Changed(len(change.items), len(made.added), made.num_blocks)

    def _recoded(self, codes: Mapping[ItemId, tuple[int, ...]]) -> Update:
        """What the codes of some items change. Raises RequestError where they cannot be theirs."""
        if not codes:
            return Update()
        if self._recommender is None:
            raise named("codes: no decoder of semantic IDs is served; leave them out", "codes")
        update = Update(remove=frozenset(_with_codes(self._recommender, codes)), add=codes)
        try:
            self._recommender.codes.check(update)
        except DataError as error:
            raise named(f"codes: {error}", "codes") from error
        return update

    def _recode(self, recommender: Recommender, change: PutItems, recoded: Update) -> None:
        """The same items for the decoder, which reads their semantic IDs."""
        if change.codes:
            recommender.codes.apply(recoded)
            recommender.codes.flush()
        if recommender.engine is not self._engine:
            recommender.engine.upsert_items(with_sid(item, _codes_of(recommender, item)) for item in change.items)

    def _remove(self, item_ids: Iterable[ItemId]) -> Changed:
        gone = list(dict.fromkeys(item_ids))
        self._engine.catalogue.check_all_known(gone)
        made = self._engine.upsert_items((), gone=gone)
        if self._recommender is not None:
            if there := _with_codes(self._recommender, gone):
                self._recommender.codes.remove(there)
                self._recommender.codes.flush()
            if self._recommender.engine is not self._engine:
                self._recommender.engine.upsert_items((), gone=gone)
        return Changed(len(gone), 0, made.num_blocks)

    def _erase(self, change: EraseUser) -> Changed:
        if self._guard is not None:
            self._guard.forget_user(change.user_id)
        removed = 0
        try:
            removed += self._engine.erase_user(change.user_id, change.tenant)  # no draft is begun for the user after it
        finally:  # also where a tier could not be reached
            with self._engine.alone():
                self._pools.erase(whose(change.user_id, change.tenant) or change.user_id)
            if self._recommender is not None and self._recommender.engine is not self._engine:
                removed += self._recommender.engine.erase_user(change.user_id, change.tenant)
        return Changed(num_blocks=removed)


def _with_codes(recommender: Recommender, item_ids: Iterable[ItemId]) -> list[ItemId]:
    """Those that can be recommended."""
    ids = list(item_ids)
    found = recommender.codes.epoch().item_ids.find(ids)
    return [item_id for item_id, number in zip(ids, found, strict=True) if number is not None]


def _codes_of(recommender: Recommender, item: Item) -> list[int] | None:
    index = recommender.codes.epoch()
    number = index.number_of(item.item_id)
    return None if number is None else index.codes[number].tolist()
