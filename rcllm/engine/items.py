"""What becomes of the catalogue while it is served: which items changed so that their cached blocks are stale.

Knows nothing of requests or of the cache. Invariant: an item counts as changed only where the tokens that stand in a
block changed; what is volatile is rendered afresh in every request, and needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rcllm.core.ranking import Item, ItemId, TokenIds
from rcllm.data.catalogue import Catalogue
from rcllm.data.neighbours import FIELD as NEIGHBOURS
from rcllm.data.popularity import with_made_fields
from rcllm.prompt.texts import Texts


@dataclass(frozen=True, slots=True)
class ItemChanges:
    """What an update of the catalogue came to."""

    added: tuple[ItemId, ...]
    changed: tuple[ItemId, ...]  # their texts read differently now
    removed: tuple[ItemId, ...]
    num_same: int  # read as before, or differ in volatile fields alone
    num_blocks: int = 0  # cached blocks of changed and removed items, which are gone from every tier

    @property
    def stale(self) -> tuple[ItemId, ...]:
        """Items of whose old text nothing may be read any more."""
        return (*self.changed, *self.removed)


def completed(items: Iterable[Item], catalogue: Mapping[ItemId, Item], shown: Iterable[str]) -> list[Item]:
    """The items with the fields that can be made of the catalogue's interactions, where the template shows them.

    Neighbours are found among all items, offline: an item that comes without keeps those that it had.
    """
    given = Catalogue(items)
    known = given.knowing(catalogue.interactions) if isinstance(catalogue, Catalogue) else given
    made = with_made_fields(known, [name for name in shown if name != NEIGHBOURS])
    return [_with_former_neighbours(item, catalogue.get(item.item_id)) for item in made.values()]


def _with_former_neighbours(item: Item, former: Item | None) -> Item:
    if former is None or NEIGHBOURS in item.fields or not (text := former.fields.get(NEIGHBOURS)):
        return item
    return replace(item, fields={**item.fields, NEIGHBOURS: text})


def compare(
    texts: Texts, catalogue: Mapping[ItemId, Item], items: Iterable[Item], gone: Iterable[ItemId]
) -> ItemChanges:
    """What putting `items` in and taking `gone` out changes of what is read."""
    added, changed, num_same = list[ItemId](), list[ItemId](), 0
    for item in items:
        if (old := catalogue.get(item.item_id)) is None:
            added.append(item.item_id)
        elif _read(texts, old) != _read(texts, item):
            changed.append(item.item_id)
        else:
            num_same += 1
    return ItemChanges(tuple(added), tuple(changed), tuple(i for i in gone if i in catalogue), num_same)


def _read(texts: Texts, item: Item) -> tuple[TokenIds, TokenIds]:
    """What stands in the item's blocks, as a candidate and as an event."""
    return texts.item(item).ids, texts.event(item).ids
