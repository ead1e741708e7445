"""Changes of what is served: items with new texts, items that go, users who are erased.

Knows nothing of HTTP. Invariant: when a change of an item is made, every request that could have read its old text has
ended; when a user is erased, no block, draft or queue holds that user's words.
"""

from __future__ import annotations

from collections.abc import Iterable

from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import RequestError
from rcllm.server.backend import Change, Changed, EraseUser, PutItems, RemoveItems
from rcllm.server.pools import DraftPoolsByName
from rcllm.sid.vocabulary import with_sid


class Keeper:
    """Makes one change at a time; blocks until it holds."""

    def __init__(self, engine: Engine, recommender: Recommender | None, pools: DraftPoolsByName) -> None:
        self._engine, self._recommender, self._pools = engine, recommender, pools

    def make(self, change: Change) -> Changed:
        """Raises RcllmError."""
        match change:
            case PutItems():
                return self._put(change)
            case RemoveItems():
                return self._remove(change)
            case EraseUser():
                return self._erase(change.user_id)
        raise AssertionError(change)

    def _put(self, change: PutItems) -> Changed:
        self._check_codes(change)
        changes = self._engine.upsert_items(change.items)
        num_blocks = changes.num_blocks
        if self._recommender is not None:
            num_blocks += self._recode(self._recommender, change)
        return Changed(len(change.items), len(changes.added), num_blocks)

    def _check_codes(self, change: PutItems) -> None:
        if change.codes and self._recommender is None:
            raise RequestError("codes: no decoder of semantic IDs is served; leave them out")

    def _recode(self, recommender: Recommender, change: PutItems) -> int:
        """Returns how many blocks of old texts went."""
        if change.codes:
            known = recommender.codes.epoch().item_ids
            ids = list(change.codes)
            there = [each for each, number in zip(ids, known.find(ids), strict=True) if number is not None]
            recommender.codes.apply(Update(remove=frozenset(there), add=change.codes))
            recommender.codes.flush()
        catalogue = recommender.engine.prompter.catalogue
        items = [with_sid(item, self._codes_of(recommender, item.item_id)) for item in change.items]
        if recommender.engine is self._engine:
            return 0
        return recommender.engine.upsert_items(i for i in items if i.fields or i.item_id in catalogue).num_blocks

    def _codes_of(self, recommender: Recommender, item_id: ItemId) -> list[int] | None:
        index = recommender.codes.epoch()
        number = index.number_of(item_id)
        return None if number is None else index.codes[number].tolist()

    def _remove(self, change: RemoveItems) -> Changed:
        self._engine.catalogue.check_all_known(change.item_ids)
        num_blocks = self._engine.upsert_items((), gone=change.item_ids).num_blocks
        if self._recommender is not None:
            num_blocks += self._forget(self._recommender, change.item_ids)
        return Changed(len(set(change.item_ids)), 0, num_blocks)

    def _forget(self, recommender: Recommender, item_ids: Iterable[ItemId]) -> int:
        ids = list(item_ids)
        found = recommender.codes.epoch().item_ids.find(ids)
        there = [each for each, number in zip(ids, found, strict=True) if number is not None]
        if there:
            recommender.codes.remove(there)
            recommender.codes.flush()
        return 0 if recommender.engine is self._engine else recommender.engine.upsert_items((), gone=ids).num_blocks

    def _erase(self, user_id: UserId) -> Changed:
        with self._engine.alone():
            self._pools.erase(user_id)
        removed = self._engine.erase_user(user_id)
        if self._recommender is not None and self._recommender.engine is not self._engine:
            removed += self._recommender.engine.erase_user(user_id)
        return Changed(num_blocks=removed)
