"""A catalogue of semantic IDs the slow way: a dict from item to codes, and scans over all of it.

Knows nothing of tries, bitmaps or epochs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId

Codes = tuple[int, ...]


@dataclass
class SlowCodes:
    items: dict[ItemId, Codes] = field(default_factory=dict)
    disabled: set[ItemId] = field(default_factory=set)

    def apply(self, update: Update) -> None:
        for item_id in update.remove:
            self.items.pop(item_id, None)
            self.disabled.discard(item_id)
        self.items |= update.add
        for item_id, on in update.enabled.items():
            if item_id in self.items:
                (self.disabled.discard if on else self.disabled.add)(item_id)

    def prefixes(self, level: int, items: Iterable[ItemId]) -> set[Codes]:
        return {self.items[item_id][:level] for item_id in items}

    def allowed(self, allow: Collection[ItemId] | None, deny: Collection[ItemId]) -> set[ItemId]:
        named = self.items.keys() if allow is None else self.items.keys() & allow
        return set(named) - set(deny) - self.disabled
