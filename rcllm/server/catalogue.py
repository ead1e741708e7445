"""Changes of what is served: items with new texts, items that go, users who are erased.

Knows nothing of HTTP. Invariant: when a change of an item is made, every request that could have read its old text has
ended; when a user is erased, no block, draft or queue holds that user's words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import RequestError
from rcllm.server.backend import Change, Changed, EraseUser, PutItems, RemoveItems
from rcllm.server.pools import DraftPoolsByName
from rcllm.sid.vocabulary import with_sid

Naming = Callable[[frozenset[ItemId]], Iterable[threading.Event]]


class Keeper:
    """Makes one change at a time; blocks until it holds."""

    def __init__(self, engine: Engine, recommender: Recommender | None, pools: DraftPoolsByName) -> None:
        self._engine, self._recommender, self._pools = engine, recommender, pools

    def make(self, change: Change, naming: Naming) -> Changed:
        """`naming`: what ends with each request under way that names some items. Raises RcllmError."""
        match change:
            case PutItems():
                return self._put(change, naming)
            case RemoveItems():
                return self._remove(change, naming)
            case EraseUser():
                return self._erase(change.user_id)
        raise AssertionError(change)

    def _put(self, change: PutItems, naming: Naming) -> Changed:
        self._check_codes(change)
        item_ids = [item.item_id for item in change.items]
        num_new = self._engine.put_items(change.items)
        if self._recommender is not None:
            self._recode(self._recommender, change)
        return Changed(len(change.items), num_new, self._retire(item_ids, naming))

    def _check_codes(self, change: PutItems) -> None:
        if change.codes and self._recommender is None:
            raise RequestError("codes: no decoder of semantic IDs is served; leave them out")

    def _recode(self, recommender: Recommender, change: PutItems) -> None:
        if change.codes:
            known = recommender.codes.epoch().item_ids
            ids = list(change.codes)
            there = [each for each, number in zip(ids, known.find(ids), strict=True) if number is not None]
            recommender.codes.apply(Update(remove=frozenset(there), add=change.codes))
            recommender.codes.flush()
        catalogue = recommender.engine.prompter.catalogue
        items = [with_sid(item, self._codes_of(recommender, item.item_id)) for item in change.items]
        if recommender.engine is not self._engine:
            recommender.engine.put_items(each for each in items if each.fields or each.item_id in catalogue)

    def _codes_of(self, recommender: Recommender, item_id: ItemId) -> list[int] | None:
        index = recommender.codes.epoch()
        number = index.number_of(item_id)
        return None if number is None else index.codes[number].tolist()

    def _remove(self, change: RemoveItems, naming: Naming) -> Changed:
        item_ids = change.item_ids
        self._engine.remove_items(item_ids)
        if self._recommender is not None:
            self._forget(self._recommender, item_ids)
        return Changed(len(set(item_ids)), 0, self._retire(item_ids, naming))

    def _forget(self, recommender: Recommender, item_ids: Iterable[ItemId]) -> None:
        ids = list(item_ids)
        found = recommender.codes.epoch().item_ids.find(ids)
        there = [each for each, number in zip(ids, found, strict=True) if number is not None]
        if there:
            recommender.codes.remove(there)
            recommender.codes.flush()
        if recommender.engine is not self._engine:
            catalogue = recommender.engine.prompter.catalogue
            recommender.engine.remove_items([each for each in ids if each in catalogue])

    def _retire(self, item_ids: Iterable[ItemId], naming: Naming) -> int:
        ids = list(dict.fromkeys(item_ids))
        for ended in list(naming(frozenset(ids))):
            ended.wait()
        engines = [self._engine] + ([self._recommender.engine] if self._recommender is not None else [])
        return sum(engine.retire_item(item_id) for engine in dict.fromkeys(engines) for item_id in ids)

    def _erase(self, user_id: UserId) -> Changed:
        with self._engine.alone():
            self._pools.erase(user_id)
        removed = self._engine.erase_user(user_id)
        if self._recommender is not None and self._recommender.engine is not self._engine:
            removed += self._recommender.engine.erase_user(user_id)
        return Changed(num_blocks=removed)
