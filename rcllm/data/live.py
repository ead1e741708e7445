"""A catalogue that changes while it is read: items come, go and get other texts under traffic.

Knows nothing of prompts or of what is cached of them. Invariant: whoever looks an item up after a change has returned
sees what it was given; whoever runs over all items sees the ids of one moment, and nobody waits to read.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping

from rcllm.core.ranking import Item, ItemId
from rcllm.data.catalogue import Catalogue


class LiveCatalogue(Catalogue):
    """Starts as a copy of `items`. Safe to use from several threads."""

    def __init__(self, items: Mapping[ItemId, Item]) -> None:
        super().__init__(())
        self._items.update(items)
        self._changing = threading.Lock()
        self.version = 0  # grows with each change, once that can be seen
        if isinstance(items, Catalogue):
            self.interactions = items.interactions

    def __iter__(self) -> Iterator[ItemId]:
        return iter(list(self._items))

    def put(self, items: Iterable[Item], gone: Collection[ItemId] = ()) -> int:
        """Puts items in, in place of those with their ids, and takes others out; returns how many are new."""
        given = {item.item_id: item for item in items}
        with self._changing:
            num_new = sum(item_id not in self._items for item_id in given)
            self._items.update(given)
            for item_id in gone:
                self._items.pop(item_id, None)
            self.version += 1
            return num_new

    def check_all_known(self, item_ids: Iterable[ItemId]) -> None:
        """Raises UnknownItemError for the first id that is not there."""
        for item_id in item_ids:
            self[item_id]
