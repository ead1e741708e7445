"""A catalogue whose items change while it is read.

Knows nothing of who reads it, nor of what was cached of an item. Invariant: a reader sees an item whole, as it was
before a change or after it, and never waits; an iteration sees the ids as they were when it began.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, overload

from rcllm.core.ranking import Item, ItemId
from rcllm.data.text import did_you_mean, shown
from rcllm.errors import UnknownItemError

_Default = TypeVar("_Default")


class LiveCatalogue(Mapping[ItemId, Item]):
    """Begins as a copy of `items`, which is never changed itself."""

    def __init__(self, items: Mapping[ItemId, Item]) -> None:
        self._items = dict(items)
        self._changing = threading.Lock()

    def put(self, items: Iterable[Item]) -> int:
        """Adds items, or replaces those that have the same id; returns how many are new."""
        added = {item.item_id: item for item in items}
        with self._changing:
            before = len(self._items)
            self._items.update(added)
            return len(self._items) - before

    def remove(self, item_ids: Iterable[ItemId]) -> None:
        """Raises UnknownItemError, before anything is changed."""
        gone = list(dict.fromkeys(item_ids))
        with self._changing:
            for item_id in gone:
                if item_id not in self._items:
                    raise self._unknown(item_id)
            for item_id in gone:
                del self._items[item_id]

    def __getitem__(self, item_id: ItemId) -> Item:
        try:
            return self._items[item_id]
        except KeyError:
            raise self._unknown(item_id) from None

    # Mapping derives `get` from KeyError, which UnknownItemError is not.
    @overload
    def get(self, item_id: ItemId, /) -> Item | None: ...
    @overload
    def get(self, item_id: ItemId, default: Item | _Default, /) -> Item | _Default: ...
    def get(self, item_id: ItemId, default: object = None, /) -> object:
        return self._items.get(item_id, default)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ItemId]:
        return iter(list(self._items))

    def _unknown(self, item_id: ItemId) -> UnknownItemError:
        return UnknownItemError(
            f"the catalogue of {len(self._items):,} items has no item {shown(item_id)}.{did_you_mean(item_id, self)}"
        )
