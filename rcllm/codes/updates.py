"""Changes of a catalogue of semantic IDs, as values.

Knows nothing of tries or threads. Invariant: one update that `merged` makes of several does what they do one after
another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rcllm.core.ranking import ItemId


@dataclass(frozen=True, slots=True)
class Update:
    """One change, seen as a whole or not at all: first removes, then adds, then enables and disables."""

    remove: frozenset[ItemId] = frozenset()
    add: Mapping[ItemId, tuple[int, ...]] = field(default_factory=dict)  # codes of the new items, which are enabled
    enabled: Mapping[ItemId, bool] = field(default_factory=dict)  # whether an item is on offer from now on


def merged(updates: Iterable[Update]) -> Update:
    """One update for several, in their order."""
    remove: set[ItemId] = set()
    add: dict[ItemId, tuple[int, ...]] = {}
    enabled: dict[ItemId, bool] = {}
    for update in updates:
        for item_id in update.remove:
            add.pop(item_id, None)
            enabled.pop(item_id, None)
        remove |= update.remove
        add |= update.add
        enabled |= update.enabled
    return Update(frozenset(remove), add, enabled)
