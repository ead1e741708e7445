"""A catalogue that changes while it is read: items come, go and get other texts under traffic.

Knows nothing of prompts or of what is cached of them. Invariants: whoever looks an item up after a change has returned
sees what it was given; whoever runs over all items sees the ids of one moment, and nobody waits to read. What is read
after `version` and before `has_changed` of it, while that is false, is all of one moment.
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
        self._version = 0  # grows with each change, before any of it can be seen
        if isinstance(items, Catalogue):
            self.interactions = items.interactions

    def __iter__(self) -> Iterator[ItemId]:
        return iter(list(self._items))

    @property
    def version(self) -> int:
        """Names the items as they are between two changes; waits for the end of one that is under way."""
        with self._changing:
            return self._version

    def has_changed(self, since: int) -> bool:
        """Whether a change has begun since `version` was read."""
        return self._version != since

    def put(self, items: Iterable[Item], gone: Collection[ItemId] = ()) -> int:
        """Puts items in, in place of those with their ids, and takes others out; returns how many are new."""
        given = {item.item_id: item for item in items}
        with self._changing:
            self._version += 1
            num_new = sum(item_id not in self._items for item_id in given)
            self._items.update(given)
            for item_id in gone:
                self._items.pop(item_id, None)
            return num_new

    def check_all_known(self, item_ids: Iterable[ItemId]) -> None:
        """Raises UnknownItemError for the first id that is not there."""
        for item_id in item_ids:
            self[item_id]
