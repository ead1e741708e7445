"""A catalogue that changes while it is read: items come, go and get other texts under traffic.

Knows nothing of prompts or of what is cached of them. Invariant: whoever looks an item up after `put` has returned
sees what it was given; whoever runs over all items sees those of one moment.
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
        self._writing = threading.Lock()
        self.version = 0  # grows with each update, once that can be seen
        if isinstance(items, Catalogue):
            self.interactions = items.interactions

    def __iter__(self) -> Iterator[ItemId]:
        return iter(list(self._items))

    def put(self, items: Iterable[Item], gone: Collection[ItemId] = ()) -> None:
        """Puts items in, in place of those with their ids, and takes others out."""
        with self._writing:
            for item in items:
                self._items[item.item_id] = item
            for item_id in gone:
                self._items.pop(item_id, None)
            self.version += 1
